"""Owns the connection to one decode instance: what goes out to it, and who gets what comes back.

Knows no ledger and no request's state: it delivers events to whoever attached for a request id.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any

import grpc
from twinpool.v1 import kv_pb2, worker_pb2, worker_pb2_grpc

from router.events import (
    DecodeEvent,
    DecodeFailed,
    FirstToken,
    Grant,
    Output,
    Paused,
    Sent,
    TransferLost,
)
from router.membership import Instance
from router.request import ValidRequest
from router.wire import (
    first_token_from_wire,
    output_from_wire,
    sampling_to_wire,
    stop_to_wire,
)
from router.workers import (
    ABORT_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    Dial,
    answers,
    layout_from,
    ttl_ms,
    worker_error,
)
from service.errors import Unavailable, WorkFailed
from service.trace import trace_metadata

RESERVE_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 2.0

_log = logging.getLogger(__name__)

# A grpc.aio.StreamStreamCall and what it reads at its end; grpc's stubs have neither in full.
_Stream = Any
_EOF: Any = grpc.aio.EOF


class DecodeLink:
    """One instance's connection: a Run stream that carries the tokens of all requests there.

    It reconnects until it is closed. Each stream has a router id of its own, so that the end of
    an old one, noticed late by the instance, does not release what was reserved under the new.
    `on_up` and `on_down` are called as streams come and go; at `on_down` every attached request
    has been told.
    """

    def __init__(
        self,
        instance: Instance,
        *,
        dial: Dial,
        router_id: str,
        on_up: Callable[[], None],
        on_down: Callable[[], None],
    ) -> None:
        self.instance = instance
        self._router_id = router_id
        self._stream_id = ""
        self._on_up = on_up
        self._on_down = on_down
        self._inboxes: dict[int, Callable[[DecodeEvent], None]] = {}
        self._outbox: asyncio.Queue[worker_pb2.DecodeRunRequest] = asyncio.Queue()
        self._up = False
        self._channel = dial(instance.address)
        self._stub = worker_pb2_grpc.DecodeStub(self._channel)
        self._task = asyncio.create_task(self._keep_connected())

    def attach(self, request_id: int, inbox: Callable[[DecodeEvent], None]) -> None:
        """From here on the request's events go to `inbox`. Raises Unavailable while down."""
        if not self._up:
            raise self._lost()
        self._inboxes[request_id] = inbox

    def detach(self, request_id: int) -> None:
        self._inboxes.pop(request_id, None)

    async def reserve(
        self,
        request_id: int,
        request: ValidRequest,
        source: Instance,
        cp_first: int,
        remaining_s: float,
        dp_rank: int = 0,
        source_ranks: Collection[int] = (),
    ) -> Grant:
        """Reserves for one request, whose prompt begins at a prefill instance's rank `cp_first`.

        The KV may as well come from a decode instance, from `source_ranks` where only some of its
        ranks have it.
        Raises what the instance answered, as a service error.
        """
        message = self._reserve_request(request_id, request, remaining_s, dp_rank)
        message.prefill_instance = source.key.name
        message.prefill_epoch = source.key.epoch
        message.prefill_layout.CopyFrom(layout_from(source, cp_first, source_ranks))
        return await self._reserve(message, remaining_s)

    async def reserve_local(
        self, request_id: int, request: ValidRequest, remaining_s: float, dp_rank: int = 0
    ) -> Grant:
        """Reserves for a request whose prompt the instance computes itself; FirstToken follows.

        Nothing can be sent by what is returned. Raises as `reserve`.
        """
        message = self._reserve_request(
            request_id, request, remaining_s, dp_rank, needs_prompt=True
        )
        message.local_prefill = True
        return await self._reserve(message, remaining_s)

    def _reserve_request(
        self,
        request_id: int,
        request: ValidRequest,
        remaining_s: float,
        dp_rank: int,
        *,
        needs_prompt: bool = False,
    ) -> worker_pb2.ReserveRequest:
        if not self._up:
            raise self._lost()
        # What its prefix cache is looked up by, if it has one.
        needs_prompt |= bool(self.instance.prefix_seed)
        needs_prompt |= request.sampling.repetition_penalty != 1.0
        own = len(request.prompt_token_ids) - request.output_tokens
        return worker_pb2.ReserveRequest(
            request_id=request_id,
            router_id=self._stream_id,
            prompt_tokens=len(request.prompt_token_ids),
            sampling=sampling_to_wire(request.sampling),
            stop=stop_to_wire(request.stop),
            ttl_ms=ttl_ms(remaining_s),
            prompt_token_ids=request.prompt_token_ids[:own] if needs_prompt else (),
            output_token_ids=request.prompt_token_ids[own:],
            cache_salt=request.cache_salt,
            dp_rank=dp_rank,
            came_us=request.came_us,
        )

    async def _reserve(self, message: worker_pb2.ReserveRequest, remaining_s: float) -> Grant:
        try:
            response = await self._stub.Reserve(
                message, timeout=min(RESERVE_TIMEOUT_S, remaining_s), metadata=trace_metadata()
            )
        except grpc.aio.AioRpcError as exc:
            raise worker_error(self.instance, exc) from exc
        return _grant(response.grant, response.cached_tokens)

    async def regrant(
        self, request_id: int, prefill: Instance, cp_first: int, remaining_s: float
    ) -> Grant | None:
        """Lets another prefill instance send the rest; None where decode has the whole KV.

        Raises what the instance answered, as a service error.
        """
        if not self._up:
            raise self._lost()
        message = worker_pb2.RegrantRequest(
            request_id=request_id,
            prefill_instance=prefill.key.name,
            prefill_epoch=prefill.key.epoch,
            prefill_layout=layout_from(prefill, cp_first),
        )
        try:
            response = await self._stub.Regrant(
                message, timeout=min(RESERVE_TIMEOUT_S, remaining_s), metadata=trace_metadata()
            )
        except grpc.aio.AioRpcError as exc:
            raise worker_error(self.instance, exc) from exc
        return _grant(response.grant) if response.HasField("grant") else None

    def activate(self, request_id: int, first_token_id: int) -> None:
        """Hands the first token over; decode goes on from it."""
        activate = worker_pb2.Activate(request_id=request_id, first_token_id=first_token_id)
        self._outbox.put_nowait(worker_pb2.DecodeRunRequest(activate=activate))

    def pause(self, request_id: int) -> None:
        """Asks for a running sequence to leave the batch; Paused follows, or its end."""
        pause = worker_pb2.Pause(request_id=request_id)
        self._outbox.put_nowait(worker_pb2.DecodeRunRequest(pause=pause))

    def resume(self, request_id: int) -> None:
        """Lets a paused sequence go on here."""
        resume = worker_pb2.Resume(request_id=request_id)
        self._outbox.put_nowait(worker_pb2.DecodeRunRequest(resume=resume))

    def send(self, request_id: int, grant: Grant) -> None:
        """Has a paused sequence's KV sent where the grant says; Sent follows, or TransferLost."""
        send = worker_pb2.Send(request_id=request_id, grant=kv_pb2.Grant.FromString(grant.wire))
        self._outbox.put_nowait(worker_pb2.DecodeRunRequest(send=send))

    async def abort(self, request_id: int) -> bool:
        """Ends a request whatever its state; False where the instance did not confirm it.

        Where the stream has broken there is nothing to do: its end released everything.
        """
        try:
            if self._up:
                await self._stub.Abort(
                    worker_pb2.DecodeAbortRequest(request_id=request_id), timeout=ABORT_TIMEOUT_S
                )
        except grpc.aio.AioRpcError:
            return not self._up
        return True

    async def answers(self) -> bool:
        """Returns whether the instance answers at all, within a few seconds."""
        return await answers(self._channel)

    def lose(self) -> None:
        """Gives the instance up: tells every attached request now, and calls back no more."""
        self._on_down = self._on_up = lambda: None
        self._task.cancel()
        self._go_down()

    async def close(self) -> None:
        """Ends the stream, which releases at the instance all that is left there."""
        self.lose()
        await asyncio.wait({self._task})
        await self._channel.close(None)

    def _lost(self) -> Unavailable:
        return Unavailable(
            f"decode instance {self.instance.key.name!r} is lost", reason="INSTANCE_LOST"
        )

    async def _keep_connected(self) -> None:
        streams = 0
        backoff_s = _FIRST_BACKOFF_S
        while True:
            streams += 1
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await self._channel.channel_ready()
                self._stream_id = f"{self._router_id}.{streams}"
                if await self._serve_stream():
                    backoff_s = _FIRST_BACKOFF_S
            except TimeoutError:
                self._log_trouble(f"no connection in {CONNECT_TIMEOUT_S:g} s")
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    def _log_trouble(self, what: str) -> None:
        _log.warning(
            "stream to decode instance %s at %s: %s; trying again",
            self.instance.key.name,
            self.instance.address,
            what,
        )

    async def _serve_stream(self) -> bool:
        """Runs one stream to its end; returns whether it ever was one."""
        call: _Stream = self._stub.Run()
        writer: asyncio.Task[None] | None = None
        try:
            hello = worker_pb2.RouterHello(router_id=self._stream_id)
            await call.write(worker_pb2.DecodeRunRequest(hello=hello))
            self._outbox = asyncio.Queue()
            writer = asyncio.create_task(self._write(call, self._outbox))
            self._up = True
            self._on_up()
            while (message := await call.read()) is not _EOF:
                self._deliver(message)
        except grpc.aio.AioRpcError as exc:
            self._log_trouble(exc.details() or exc.code().name)
        finally:
            if writer is not None:
                writer.cancel()
            call.cancel()
            self._go_down()
        return writer is not None

    async def _write(
        self,
        call: _Stream,
        outbox: asyncio.Queue[worker_pb2.DecodeRunRequest],
    ) -> None:
        # A write fails only where the stream is broken, and then the reader tells.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await call.write(await outbox.get())

    def _deliver(self, message: worker_pb2.DecodeRunResponse) -> None:
        for output in message.outputs:
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:
                inbox(Output(output_from_wire(output)))
        for request_id, event in self._rare_events(message):
            inbox = self._inboxes.get(request_id)
            if inbox is not None:
                inbox(event)

    def _rare_events(
        self, message: worker_pb2.DecodeRunResponse
    ) -> Iterator[tuple[int, DecodeEvent]]:
        for failure in message.failures:
            yield failure.request_id, DecodeFailed(self._failed(failure))
        for lost in message.lost_transfers:
            error = self._failed(lost)
            yield lost.request_id, TransferLost(transfer_id=lost.transfer_id, error=error)
        for first in message.first_tokens:
            told = first.first_token
            yield (
                first.request_id,
                FirstToken(
                    tokens=first_token_from_wire(told),
                    queue_s=told.queue_s,
                    prefill_s=told.prefill_s,
                    cached_tokens=told.cached_tokens,
                ),
            )
        for paused in message.paused:
            yield paused.request_id, Paused(tokens=paused.tokens, ranks=tuple(paused.ranks))
        for sent in message.sent:
            yield sent.request_id, Sent(kv_bytes=sent.bytes, transport=sent.transport)

    def _failed(self, failure: worker_pb2.SequenceFailure | worker_pb2.TransferLost) -> WorkFailed:
        return WorkFailed(
            f"decode instance {self.instance.key.name!r}: {failure.message}",
            reason=failure.reason,
            retryable=failure.retryable,
        )

    def _go_down(self) -> None:
        if not self._up:
            return
        self._up = False
        inboxes, self._inboxes = self._inboxes, {}
        for inbox in inboxes.values():
            inbox(DecodeFailed(self._lost()))
        self._on_down()


def _grant(message: kv_pb2.Grant, cached_tokens: int = 0) -> Grant:
    return Grant(
        transfer_id=message.transfer_id,
        wire=message.SerializeToString(),
        cached_tokens=cached_tokens,
    )
