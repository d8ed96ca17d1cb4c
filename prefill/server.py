"""The prefill instance as a gRPC server: one stream per request, and aborts.

Owns the streams' outcomes. Wire messages become
dataclasses here and go no further in.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from twinpool.v1 import worker_pb2, worker_pb2_grpc

from engine.config import ModelConfig
from prefill.handoff import Transfers
from prefill.metrics import Metrics
from prefill.records import FirstToken, Outcome, Request, RequestFailed, Transferred
from prefill.worker import Worker
from service.errors import InvalidRequest, Refused, Unavailable, WorkFailed
from service.logs import about_request
from service.peers import Peers
from service.trace import current_trace_id
from service.wire import (
    finish_to_wire,
    logprobs_to_wire,
    sampling_from_wire,
    stop_from_wire,
)

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 0.5


class PrefillService(worker_pb2_grpc.PrefillServicer):
    """Serves `twinpool.v1.Prefill` for one instance."""

    def __init__(
        self,
        *,
        name: str,
        config: ModelConfig,
        total_blocks: int,
        cp: int,
        max_queue: int,
        worker: Worker,
        transfers: Transfers,
        peers: Peers,
        metrics: Metrics,
    ) -> None:
        self._name = name
        self._config = config
        self._total_blocks = total_blocks
        self._cp = cp
        self._max_queue = max_queue
        self._worker = worker
        self._transfers = transfers
        self._peers = peers
        self._metrics = metrics
        self._outcomes: dict[int, asyncio.Queue[Outcome]] = {}
        self._loop = asyncio.get_running_loop()
        self.draining = False

    async def Run(
        self, request_iterator: AsyncIterator[worker_pb2.PrefillRunRequest], context: Any
    ) -> AsyncIterator[worker_pb2.PrefillRunResponse]:
        """Prefill one request: start and grants in, first token and the transfer's end out."""
        request = self._request(await anext(request_iterator, None))
        request_id = request.request_id
        log.debug("begins", extra=about_request(request_id))
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self._outcomes[request_id] = outcomes
        reader = asyncio.ensure_future(self._read_grants(request_id, request_iterator, outcomes))
        try:
            if request.transfer:
                self._transfers.expect(request_id)
            self._worker.submit(request)
            last = False
            while not last:
                outcome = await outcomes.get()
                message, last = _to_wire(outcome, request.transfer)
                yield message
        finally:
            reader.cancel()
            del self._outcomes[request_id]
            self._worker.abort(request_id)

    async def Abort(
        self, request: worker_pb2.PrefillAbortRequest, context: Any
    ) -> worker_pb2.PrefillAbortResponse:
        """End a request at any moment."""
        self._worker.abort(request.request_id)
        if (outcomes := self._outcomes.get(request.request_id)) is not None:
            outcomes.put_nowait(
                RequestFailed(reason="Aborted", message="aborted by the router", retryable=False)
            )
        return worker_pb2.PrefillAbortResponse()

    def emit(self, request_id: int, outcome: Outcome) -> None:
        """Hand an outcome to the request's stream; called by the worker's thread."""
        self._loop.call_soon_threadsafe(self._deliver, request_id, outcome)

    async def drain(self) -> None:
        """Take nothing new; return when every request has ended."""
        self.draining = True
        while self._outcomes:
            await asyncio.sleep(0.05)

    def _deliver(self, request_id: int, outcome: Outcome) -> None:
        self._metrics.observe(outcome)
        if (outcomes := self._outcomes.get(request_id)) is not None:
            outcomes.put_nowait(outcome)

    def _request(self, message: worker_pb2.PrefillRunRequest | None) -> Request:
        if message is None or message.WhichOneof("kind") != "start":
            raise InvalidRequest("start", found="missing", hint="send PrefillStart first")
        start = message.start
        prompt = list(start.prompt_token_ids)
        if self.draining:
            raise Unavailable(f"prefill instance {self._name} is draining", reason="DRAINING")
        if start.request_id in self._outcomes:
            raise InvalidRequest("request_id", found="in use", hint="choose a fresh id")
        if not prompt or max(prompt) >= self._config.vocab_size:
            raise InvalidRequest(
                "prompt_token_ids",
                found="no token" if not prompt else max(prompt),
                hint=f"give tokens below {self._config.vocab_size}",
            )
        if start.cp_first >= self._cp:
            raise InvalidRequest(
                "cp_first", found=start.cp_first, hint=f"give one of {self._cp} cp ranks, from 0"
            )
        if start.output_tokens >= min(len(prompt), start.stop.max_new_tokens):
            raise InvalidRequest(
                "output_tokens",
                found=start.output_tokens,
                hint="give fewer than the prompt has tokens, and fewer than max_new_tokens",
            )
        blocks = self._worker.blocks_for(len(prompt))
        if blocks > self._total_blocks:
            raise Refused("PROMPT_TOO_LONG", needed=blocks, free=self._total_blocks)
        if len(self._outcomes) >= self._max_queue:
            raise Refused("PREFILL_QUEUE_FULL", needed=1, free=0, retry_after_s=_RETRY_AFTER_S)
        return Request(
            request_id=start.request_id,
            prompt=prompt,
            sampling=sampling_from_wire(start.sampling),
            stop=stop_from_wire(start.stop, self._config.eos_token_ids),
            ttl_s=start.ttl_ms / 1000,
            priority=start.priority,
            cache_salt=start.cache_salt.encode(),
            tenant=start.tenant,
            transfer=start.transfer,
            cp_first=start.cp_first,
            trace_id=current_trace_id(),
            output_tokens=start.output_tokens,
        )

    async def _read_grants(
        self,
        request_id: int,
        messages: AsyncIterator[worker_pb2.PrefillRunRequest],
        outcomes: asyncio.Queue[Outcome],
    ) -> None:
        async for message in messages:
            try:
                for grant in message.grants.grants:
                    self._transfers.grant(request_id, self._peers.grant(grant))
            except WorkFailed as error:
                outcomes.put_nowait(
                    RequestFailed(
                        reason=error.reason, message=error.message, retryable=error.retryable
                    )
                )


def _to_wire(outcome: Outcome, transfer: bool) -> tuple[worker_pb2.PrefillRunResponse, bool]:
    """The message for an outcome, and whether it is the last.

    Raises:
        WorkFailed: The outcome is a failure.
    """
    match outcome:
        case FirstToken(sampled=sampled, finish=finish):
            first = worker_pb2.FirstToken(
                token_id=sampled.token_id,
                logprobs=logprobs_to_wire(sampled),
                finish_reason=finish_to_wire(finish),
                queue_s=outcome.queue_s,
                prefill_s=outcome.prefill_s,
                cached_tokens=outcome.cached_tokens,
            )
            last = finish is not None or not transfer
            return worker_pb2.PrefillRunResponse(first_token=first), last
        case Transferred():
            transferred = worker_pb2.Transferred(
                bytes=outcome.bytes,
                messages=outcome.messages,
                transport=outcome.transport,
                handoff_s=outcome.handoff_s,
            )
            return worker_pb2.PrefillRunResponse(transferred=transferred), True
        case RequestFailed():
            raise WorkFailed(outcome.message, reason=outcome.reason, retryable=outcome.retryable)
