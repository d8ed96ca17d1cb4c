"""The decode instance as a gRPC server: reservations, the routers' token streams, aborts.

Owns the routers' streams and the wiring of admission, transfer agent and step loop. Wire messages
become dataclasses here and go no further in.
"""

import asyncio
import logging
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from twinpool.v1 import kv_pb2, worker_pb2, worker_pb2_grpc

from decode.admission import Admission
from decode.compute import Compute
from decode.metrics import Metrics
from decode.receiver import Receiver
from decode.refusals import NoRoom, StillOpen
from decode.sender import Sender
from decode.sequence import Reservation, SequenceRecord
from decode.told import tokens_to_wire
from decode.worker import Step, Worker
from engine.config import ModelConfig
from kvtransfer import (
    CacheLayout,
    Closed,
    Completed,
    Failed,
    ReceiveGrant,
    Span,
    TransferEvent,
)
from service.errors import Incompatible, InvalidRequest, NotFound, Refused, Unavailable, WorkFailed
from service.logs import about_request
from service.ranks.joined import End
from service.trace import current_trace_id
from service.wire import (
    kept_to_wire,
    layout_from_wire,
    sampling_from_wire,
    span_to_wire,
    stop_from_wire,
)

log = logging.getLogger(__name__)

_SWEEP_S = 0.1
# What a router should wait before it asks again for room that a running request will give back.
_RETRY_AFTER_S = 0.05
# Before the end of the drain: enough for routers to hear of what is handed back.
_HAND_BACK_S = 1.0
# What a lost sender had sent may still be on its way in; after this its transfer is ended.
_LAST_PIECES_S = 0.25


@dataclass(eq=False)
class _RouterStream:
    """One router's token stream: what waits to be sent on it, None at its end."""

    router_id: str
    queue: asyncio.Queue[worker_pb2.DecodeRunResponse | None] = field(default_factory=asyncio.Queue)


class DecodeService(worker_pb2_grpc.DecodeServicer):
    """Serves `twinpool.v1.Decode` for one instance."""

    def __init__(
        self,
        *,
        name: str,
        epoch: int,
        config: ModelConfig,
        max_sequence_tokens: int,
        dp: int = 1,
        computes_prompts: bool = False,
        drain_timeout_s: float,
        admission: Admission,
        worker: Worker,
        compute: Compute,
        receiver: Receiver,
        sender: Sender,
        metrics: Metrics,
    ) -> None:
        self._name = name
        self._epoch = epoch
        self._config = config
        self._max_sequence_tokens = max_sequence_tokens
        self._dp = dp
        self._computes_prompts = computes_prompts
        self._drain_timeout_s = drain_timeout_s
        self._admission = admission
        self._worker = worker
        self._compute = compute
        self._receiver = receiver
        self._sender = sender
        self._metrics = metrics
        self._routers: dict[str, _RouterStream] = {}
        self.draining = False
        self._loop = asyncio.get_running_loop()

    # ---- called by routers

    async def Reserve(
        self, request: worker_pb2.ReserveRequest, context: Any
    ) -> worker_pb2.ReserveResponse:
        """Hold room for a request and open the door for its KV."""
        log.debug("reserves", extra=about_request(request.request_id))
        if self.draining:
            raise Unavailable(f"decode instance {self._name} is draining", reason="DRAINING")
        if request.router_id not in self._routers:
            raise Incompatible(
                "the router has no Run stream here: open it before reserving",
                reason="NO_RUN_STREAM",
            )
        if request.local_prefill:
            return self._reserve_local(request)
        source = layout_from_wire(request.prefill_layout)
        record = self._reserve(self._reservation(request))
        self._metrics.cached(record.cached_tokens)
        self._compute.add(record)
        return worker_pb2.ReserveResponse(
            grant=await self._open(record, source, request.prefill_instance),
            blocks=len(record.blocks),
            cached_tokens=record.cached_tokens,
        )

    async def Regrant(
        self, request: worker_pb2.RegrantRequest, context: Any
    ) -> worker_pb2.RegrantResponse:
        """Open the door for the rest of a request's KV, from another prefill instance."""
        source = layout_from_wire(request.prefill_layout)
        try:
            record = await self._regrant(request.request_id)
        except KeyError as error:
            raise NotFound("the request has no reservation here") from error
        if record is None:
            return worker_pb2.RegrantResponse()
        self._metrics.resumed()
        return worker_pb2.RegrantResponse(
            grant=await self._open(record, source, request.prefill_instance)
        )

    async def Run(
        self, request_iterator: AsyncIterator[worker_pb2.DecodeRunRequest], context: Any
    ) -> AsyncIterator[worker_pb2.DecodeRunResponse]:
        """One router's stream: first tokens in, every step's tokens out, while it lives."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("kind") != "hello" or not first.hello.router_id:
            raise InvalidRequest("hello", found="missing", hint="send RouterHello first")
        stream = _RouterStream(first.hello.router_id)
        if (older := self._routers.get(stream.router_id)) is not None:
            self._release_router(older)
            older.queue.put_nowait(None)
        self._routers[stream.router_id] = stream
        reader = asyncio.ensure_future(self._read(request_iterator, stream))
        try:
            while (message := await stream.queue.get()) is not None:
                yield message
        finally:
            reader.cancel()
            if self._routers.get(stream.router_id) is stream:
                del self._routers[stream.router_id]
                self._release_router(stream)

    async def Abort(
        self, request: worker_pb2.DecodeAbortRequest, context: Any
    ) -> worker_pb2.DecodeAbortResponse:
        """End a request, whatever its state."""
        self._abort(request.request_id)
        return worker_pb2.DecodeAbortResponse()

    # ---- called by the engine's and the agent's threads

    def emit(self, step: Step) -> None:
        """Hand a step's tokens to the routers' streams."""
        self._loop.call_soon_threadsafe(self._deliver, step)

    def hand_back(self, record: SequenceRecord) -> None:
        """Have a sequence go on elsewhere, or here later, since others need its blocks."""
        # A reserved one ends in the loop's thread: between its reservation and the opening of its
        # grant nothing else runs there, so that what is to be revoked is known.
        self._loop.call_soon_threadsafe(self._preempt, record)

    def transfer_event(self, event: TransferEvent) -> None:
        """What the receive agent has to say. A failed transfer never yields a token."""
        if isinstance(event, Completed):
            record = self._admission.complete(event.transfer_id)
            if record is not None:
                self._worker.ready(record.request_id)
        elif isinstance(event, Failed):
            record = self._admission.writer_closed(event.transfer_id, event.kept)
            if record is not None:
                log.warning(
                    "KV transfer failed: %s",
                    event.error,
                    extra=about_request(record.request_id, record.reservation.trace_id),
                )
                self._loop.call_soon_threadsafe(self._tell, record, _lost(record, event))
        elif isinstance(event, Closed):
            self._admission.writer_closed(event.transfer_id, event.kept)

    def paused(self, record: SequenceRecord) -> None:
        """A sequence has left the batch, and its latest tokens have been handed out."""
        paused = worker_pb2.Paused(
            request_id=record.request_id,
            tokens=_tokens_cached(record),
            ranks=self._sender.ranks_of(record.dp_rank),
        )
        message = worker_pb2.DecodeRunResponse(paused=[paused])
        self._loop.call_soon_threadsafe(self._tell, record, message)

    def sent_event(self, event: End) -> None:
        """How the sending of a paused sequence has ended, on all ranks."""
        record = self._admission.returned(event.transfer_id)
        if record is None:
            return
        if isinstance(event, Completed):
            # All of it is at the other instance, which goes on, or else nobody does.
            self._worker.abort(record.request_id)
            sent = worker_pb2.Sent(
                request_id=record.request_id,
                transfer_id=event.transfer_id,
                bytes=event.stats.bytes,
                transport=event.stats.transport,
            )
            self._metrics.sent("sent", event.stats.bytes)
            message = worker_pb2.DecodeRunResponse(sent=[sent])
        elif isinstance(event, Failed):
            self._metrics.sent("failed")
            message = _lost(record, event)
        else:
            self._metrics.sent("ended")
            return
        self._loop.call_soon_threadsafe(self._tell, record, message)

    # ---- background

    async def sweep(self) -> None:
        """End requests whose time is up, whether or not anything else happens."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            for record in self._admission.expired():
                self._fail(record, "DeadlineExceeded", "the deadline passed at decode", False)

    async def drain(self) -> None:
        """Take nothing new; return when every sequence has ended.

        Those that take longer than the drain may are handed back, to go on elsewhere.
        """
        self.draining = True
        # Routers are about to have sequences sent to where there is room.
        self._sender.connect()
        try:
            async with asyncio.timeout(max(0.0, self._drain_timeout_s - _HAND_BACK_S)):
                await self._until_empty()
        except TimeoutError:
            left = self._admission.all()
            log.info("handing back %d sequences: the time to finish them is over", len(left))
            for record in left:
                self._fail(record, "DRAINED", "the instance stops", True)
            await self._until_empty()

    async def _until_empty(self) -> None:
        while self._admission.held:
            await asyncio.sleep(0.05)

    # ---- the loop's thread

    def _reservation(self, request: worker_pb2.ReserveRequest) -> Reservation:
        reservation = Reservation(
            request_id=request.request_id,
            router_id=request.router_id,
            prompt_tokens=request.prompt_tokens,
            prompt_ids=array("I", request.prompt_token_ids),
            output_ids=array("I", request.output_token_ids),
            sampling=sampling_from_wire(request.sampling),
            stop=stop_from_wire(request.stop, self._config.eos_token_ids),
            ttl_s=request.ttl_ms / 1000,
            cache_salt=request.cache_salt.encode(),
            dp_rank=request.dp_rank,
            came_us=request.came_us,
            trace_id=current_trace_id(),
            is_local=request.local_prefill,
        )
        if reservation.dp_rank >= self._dp:
            raise InvalidRequest(
                "dp_rank", found=reservation.dp_rank, hint=f"this instance has {self._dp}"
            )
        own = reservation.own_prompt_tokens
        if reservation.prompt_ids and len(reservation.prompt_ids) != own:
            raise InvalidRequest(
                "prompt_token_ids",
                found=len(reservation.prompt_ids),
                hint=f"give none, or all {own} that were not generated",
            )
        most = self._max_sequence_tokens
        if not 0 < own <= reservation.prompt_tokens < reservation.max_tokens <= most:
            raise InvalidRequest(
                "prompt_tokens + max_new_tokens",
                found=reservation.max_tokens,
                hint=f"this instance holds sequences of 2 to {most} tokens",
            )
        return reservation

    def _reserve_local(self, request: worker_pb2.ReserveRequest) -> worker_pb2.ReserveResponse:
        """Hold room for a request, and have its prompt computed here."""
        if not self._computes_prompts:
            raise Incompatible(
                f"decode instance {self._name} computes no prompts: name a prefill instance",
                reason="NO_LOCAL_PREFILL",
            )
        found, most = max(request.prompt_token_ids, default=None), self._config.vocab_size
        if found is None or found >= most:
            raise InvalidRequest(
                "prompt_token_ids", found=found, hint=f"give them, each below {most}"
            )
        record = self._reserve(self._reservation(request))
        self._compute.add(record)
        if self._admission.begin(record.request_id):
            self._worker.ready(record.request_id)
        return worker_pb2.ReserveResponse(
            blocks=len(record.blocks), cached_tokens=record.cached_tokens
        )

    def _reserve(self, reservation: Reservation) -> SequenceRecord:
        try:
            return self._admission.reserve(reservation)
        except NoRoom as error:
            self._metrics.refused()
            raise Refused(
                error.reason, needed=error.needed, free=error.free, retry_after_s=_RETRY_AFTER_S
            ) from error
        except ValueError as error:
            raise InvalidRequest("request_id", found="in use", hint=str(error)) from error

    async def _regrant(self, request_id: int) -> SequenceRecord | None:
        """Wait for the transfer under way to end, then as `Admission.regrant`."""
        while True:
            try:
                return self._admission.regrant(request_id)
            except StillOpen as error:
                transfer = error.transfer
            over = asyncio.wrap_future(transfer.over)
            await asyncio.wait({over}, timeout=_LAST_PIECES_S)
            if not over.done():
                self._receiver.revoke(transfer.transfer_id)
                await over

    async def _open(
        self, record: SequenceRecord, source: CacheLayout, source_instance: str
    ) -> kv_pb2.Grant:
        """Let the agent take what comes under the sequence's transfer; the grant to hand out."""
        transfer, ttl_s = record.transfer, self._admission.remaining_s(record)
        tokens = Span(0, record.reservation.prompt_tokens)
        await self._receiver.open(
            ReceiveGrant(
                transfer_id=transfer.transfer_id,
                epoch=self._epoch,
                nonce=transfer.nonce,
                tokens=tokens,
                total_tokens=tokens.end,
                block_ids=(tuple(record.blocks),),
                source_layout=source,
                source_instance=source_instance,
                ttl_s=ttl_s,
                kept=transfer.kept,
            ),
            record.dp_rank,
        )
        return kv_pb2.Grant(
            transfer_id=transfer.transfer_id,
            epoch=self._epoch,
            nonce=transfer.nonce,
            tokens=span_to_wire(tokens),
            ttl_ms=int(ttl_s * 1000),
            instance=self._name,
            kept=kept_to_wire(transfer.kept),
            ranks=self._receiver.ranks_of(record.dp_rank),
        )

    async def _read(
        self,
        requests: AsyncIterator[worker_pb2.DecodeRunRequest],
        stream: _RouterStream,
    ) -> None:
        try:
            async for request in requests:
                self._take(request)
        finally:
            stream.queue.put_nowait(None)

    def _take(self, request: worker_pb2.DecodeRunRequest) -> None:
        match request.WhichOneof("kind"):
            case "activate":
                activate = request.activate
                if self._admission.activate(activate.request_id, activate.first_token_id):
                    self._worker.ready(activate.request_id)
            case "pause":
                self._worker.pause(request.pause.request_id)
            case "resume":
                self._sender.drop(request.resume.request_id)
                self._worker.resume(request.resume.request_id)
            case "send":
                self._send(request.send.request_id, request.send.grant)

    def _send(self, request_id: int, grant: kv_pb2.Grant) -> None:
        """Send a paused sequence; where it cannot be sent, its router is told, and it stays."""
        record = self._admission.lend(request_id, grant.transfer_id)
        if record is None:
            return  # it has ended, and its router knows
        try:
            if (found := grant.tokens.end) != (tokens := _tokens_cached(record)):
                raise WorkFailed(
                    f"the grant is for {found} tokens, and there are {tokens}",
                    reason="GrantRefused",
                    retryable=True,
                )
            self._sender.send(request_id, record.dp_rank, record.blocks, grant)
        except WorkFailed as error:
            self._admission.returned(grant.transfer_id)
            self._metrics.sent("failed")
            lost = worker_pb2.TransferLost(
                request_id=request_id,
                transfer_id=grant.transfer_id,
                reason=error.reason,
                message=error.message,
                retryable=error.retryable,
            )
            self._tell(record, worker_pb2.DecodeRunResponse(lost_transfers=[lost]))

    def _deliver(self, step: Step) -> None:
        self._metrics.observe(step)
        for router_id, tokens in step.tokens.items():
            if (stream := self._routers.get(router_id)) is not None:
                stream.queue.put_nowait(tokens_to_wire(tokens))

    def _fail(self, record: SequenceRecord, reason: str, message: str, retryable: bool) -> None:
        failure = worker_pb2.SequenceFailure(
            request_id=record.request_id, reason=reason, message=message, retryable=retryable
        )
        self._tell(record, worker_pb2.DecodeRunResponse(failures=[failure]))
        self._abort(record.request_id)

    def _preempt(self, record: SequenceRecord) -> None:
        if record.missing_tokens and not record.handed_back:
            self._fail(record, "DRAINED", "it was to move before its prompt was computed", True)
            return
        self._metrics.preempted()
        self._fail(record, "PREEMPTED", "earlier requests need its room", True)

    def _tell(self, record: SequenceRecord, message: worker_pb2.DecodeRunResponse) -> None:
        if (stream := self._routers.get(record.reservation.router_id)) is not None:
            stream.queue.put_nowait(message)

    def _abort(self, request_id: int) -> None:
        if not self._admission.end_unless_running(request_id):
            self._worker.abort(request_id)

    def _release_router(self, stream: _RouterStream) -> None:
        held = self._admission.of_router(stream.router_id)
        if held:
            log.warning("a router is gone; releasing its %d requests", len(held))
        for request_id in held:
            self._abort(request_id)


def _tokens_cached(record: SequenceRecord) -> int:
    """How many of a sequence's tokens have their KV here, between two steps: all but the last."""
    return record.sampling.position - 1


def _lost(record: SequenceRecord, event: Failed) -> worker_pb2.DecodeRunResponse:
    lost = worker_pb2.TransferLost(
        request_id=record.request_id,
        transfer_id=event.transfer_id,
        reason=type(event.error).__name__,
        message=str(event.error),
        retryable=event.retryable,
    )
    return worker_pb2.DecodeRunResponse(lost_transfers=[lost])
