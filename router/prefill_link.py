"""Owns the connection to one prefill instance and the streams of the requests there.

Knows no ledger and no request's state: it delivers events to whoever started a request.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import grpc
from twinpool.v1 import kv_pb2, worker_pb2, worker_pb2_grpc

from router.events import FirstToken, Grant, PrefillEnded, PrefillEvent, Transferred
from router.membership import Instance
from router.request import ValidRequest
from router.wire import first_token_from_wire, sampling_to_wire, stop_to_wire
from router.workers import (
    ABORT_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    Dial,
    answers,
    ttl_ms,
    worker_error,
)
from service.errors import ServiceError, Unavailable
from service.trace import trace_metadata

# The request's own deadline is kept by the router; the call's is for an instance that hangs.
_DEADLINE_SLACK_S = 1.0

_log = logging.getLogger(__name__)

# A grpc.aio.StreamStreamCall and what it reads at its end; grpc's stubs have neither in full.
_Stream = Any
_EOF: Any = grpc.aio.EOF


class PrefillLink:
    """One prefill instance's connection; each request has a stream of its own there."""

    def __init__(self, instance: Instance, *, dial: Dial, on_up: Callable[[], None]) -> None:
        self.instance = instance
        self._channel = dial(instance.address)
        self._stub = worker_pb2_grpc.PrefillStub(self._channel)
        self._calls: set[PrefillCall] = set()
        self._is_lost = False
        self._task = asyncio.create_task(self._connect(on_up))

    def run(
        self,
        request_id: int,
        request: ValidRequest,
        *,
        cp_first: int,
        transfer: bool,
        remaining_s: float,
        inbox: Callable[[PrefillEvent], None],
    ) -> "PrefillCall":
        """Starts a request whose first tokens cp rank `cp_first` has.

        Its events go to `inbox`, PrefillEnded the last of them.
        """
        start = worker_pb2.PrefillStart(
            request_id=request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling=sampling_to_wire(request.sampling),
            stop=stop_to_wire(request.stop),
            ttl_ms=ttl_ms(remaining_s),
            priority=request.priority,
            cache_salt=request.cache_salt,
            tenant=request.tenant,
            cp_first=cp_first,
            transfer=transfer,
            output_tokens=request.output_tokens,
        )
        timeout_s = remaining_s + _DEADLINE_SLACK_S
        stream: _Stream = self._stub.Run(timeout=timeout_s, metadata=trace_metadata())
        call = PrefillCall(self.instance, stream, start, inbox)
        self._calls.add(call)
        call.task.add_done_callback(lambda _: self._calls.discard(call))
        return call

    async def abort(self, request_id: int) -> bool:
        """Ends a request whatever its state; False where the instance did not confirm it."""
        try:
            if not self._is_lost:
                await self._stub.Abort(
                    worker_pb2.PrefillAbortRequest(request_id=request_id), timeout=ABORT_TIMEOUT_S
                )
        except grpc.aio.AioRpcError:
            return self._is_lost
        return True

    async def answers(self) -> bool:
        """Returns whether the instance answers at all, within a few seconds."""
        return await answers(self._channel)

    def lose(self) -> None:
        """Gives the instance up: ends all streams, and whoever waits on one is told so."""
        self._is_lost = True
        self._task.cancel()
        for call in self._calls:
            call.cancel()

    async def close(self) -> None:
        """Returns once all streams have ended."""
        self.lose()
        await asyncio.wait({self._task, *(call.task for call in self._calls)})
        await self._channel.close(None)

    async def _connect(self, on_up: Callable[[], None]) -> None:
        while True:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await self._channel.channel_ready()
                on_up()
                return
            except TimeoutError:
                _log.warning(
                    "no connection to prefill instance %s at %s in %g s; trying again",
                    self.instance.key.name,
                    self.instance.address,
                    CONNECT_TIMEOUT_S,
                )


def _to_nobody(event: PrefillEvent) -> None:
    pass


class PrefillCall:
    """One request's stream to prefill. `task` is done once the stream has ended."""

    def __init__(
        self,
        instance: Instance,
        stream: _Stream,
        start: worker_pb2.PrefillStart,
        inbox: Callable[[PrefillEvent], None],
    ) -> None:
        self._instance = instance
        self._stream = stream
        self._inbox: Callable[[PrefillEvent], None] = inbox
        self._grant: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._converse(start))

    def send_grant(self, grant: Grant) -> None:
        """Sends decode's leave on, as soon as the stream takes it."""
        if not self._grant.done():
            self._grant.set_result(grant)

    def cancel(self) -> None:
        """Ends the stream from this side."""
        self._stream.cancel()

    async def _converse(self, start: worker_pb2.PrefillStart) -> None:
        sender = asyncio.create_task(self._send(start))
        error: ServiceError | None = None
        try:
            while (message := await self._stream.read()) is not _EOF:
                self._deliver(message)
            code = await self._stream.code()
            if code is not grpc.StatusCode.OK:
                error = self._lost()
        except grpc.aio.AioRpcError as exc:
            error = worker_error(self._instance, exc)
        except asyncio.CancelledError:
            # gRPC raises this at the reader of a call that was cancelled from here: the instance
            # was given up, or nobody waits for the event any more.
            error = self._lost()
        finally:
            sender.cancel()
            self._stream.cancel()
        inbox, self._inbox = self._inbox, _to_nobody  # which is free once nothing more comes
        inbox(PrefillEnded(error))

    async def _send(self, start: worker_pb2.PrefillStart) -> None:
        # A write fails only where the stream is broken, and then the reader tells.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._stream.write(worker_pb2.PrefillRunRequest(start=start))
            grant = kv_pb2.Grant.FromString((await self._grant).wire)
            grants = worker_pb2.PrefillGrants(grants=[grant])
            await self._stream.write(worker_pb2.PrefillRunRequest(grants=grants))

    def _deliver(self, message: worker_pb2.PrefillRunResponse) -> None:
        match message.WhichOneof("kind"):
            case "first_token":
                first = message.first_token
                self._inbox(
                    FirstToken(
                        tokens=first_token_from_wire(first),
                        queue_s=first.queue_s,
                        prefill_s=first.prefill_s,
                        cached_tokens=first.cached_tokens,
                    )
                )
            case "transferred":
                done = message.transferred
                self._inbox(
                    Transferred(
                        kv_bytes=done.bytes,
                        transport=done.transport,
                        handoff_s=done.handoff_s,
                    )
                )

    def _lost(self) -> Unavailable:
        return Unavailable(
            f"prefill instance {self._instance.key.name!r} is lost", reason="INSTANCE_LOST"
        )
