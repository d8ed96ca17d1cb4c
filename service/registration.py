"""The worker's side of Membership.Register: keeps one router informed of this instance.

Owns the stream, its heartbeats and the reconnects. Knows nothing of what peers or drains mean
to the instance: those go to callbacks.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any, Protocol, cast

import grpc
from twinpool.v1.worker_pb2 import (
    Accepted,
    AssetsChunk,
    Credit,
    CreditUse,
    Heartbeat,
    InstanceHello,
    Peer,
    PrefixEvents,
    RegisterRequest,
    RegisterResponse,
)
from twinpool.v1.worker_pb2_grpc import MembershipStub

from service.channels import MIB, dial
from service.errors import (
    DeadlineExceeded,
    Incompatible,
    InvalidRequest,
    PermissionDenied,
    ServiceError,
    StartError,
    Unauthenticated,
    Unavailable,
)
from service.security.settings import PLAIN, Security
from service.status import from_rpc_error, leaves

_log = logging.getLogger(__name__)

ASSETS_CHUNK_BYTES = MIB
# Between two messages on the prefix cache: soon enough for the next prompt of a conversation.
PREFIX_INTERVAL_S = 0.2
_FIRST_DELAY_S = 0.1
# A router that has started again serves when the instances are back.
_LONGEST_DELAY_S = 0.5
# So many intervals of heartbeats without an answer to a credit: the router is lost, and others need
# what it may promise.
_ANSWERS_MISSED = 5
_FINAL = (Incompatible, InvalidRequest)
# Final for a newcomer, whose token is wrong. One that was let in before may only have another token
# than the router for as long as tokens are being changed.
_NOT_LET_IN = (Unauthenticated, PermissionDenied)

_Call = Any  # grpc.aio.StreamStreamCall[RegisterRequest, RegisterResponse]


class RegistrationRefused(StartError):
    """The router does not take this instance and never will; the message is the router's."""


class PrefixSource(Protocol):
    """What has changed in the instance's prefix cache."""

    def restart(self) -> None:
        """Begin with the whole set again: a stream starts."""
        ...

    def next_events(self) -> PrefixEvents | None:
        """Return what to tell next, of bounded size, or None where there is nothing."""
        ...


class CreditLine(Protocol):
    """One router's credit while one stream to it lives."""

    def credit(self) -> Credit:
        """Return what the router is to be told now."""
        ...

    def take(self, use: CreditUse) -> None:
        """Take in the answer. Raises ValueError where it does not fit what was told."""
        ...

    def close(self) -> None:
        """The stream is over: the credit comes back."""
        ...


class CreditSource(Protocol):
    """Who divides what the instance has among routers."""

    def begin(self, router_id: str, wake: Callable[[], None]) -> CreditLine:
        """Take a router in; `wake` is to be called whenever there is a credit to send."""
        ...


class Registration:
    """Keeps one instance registered with one router.

    Callbacks run on the event loop and must not block. `assets` gives the text assets by file
    name, asked for only when the router lacks them; `prefixes` is asked for changes again and
    again, only where the router takes them. `on_peers` gets the whole list each time. `credits`
    says what the router may promise; one that stops answering is taken for lost.
    After a reconnect everything is said again, so callbacks must take repeats.
    """

    def __init__(
        self,
        *,
        router_address: str,
        hello: InstanceHello,
        heartbeat: Callable[[], Heartbeat],
        assets: Callable[[], Mapping[str, bytes]],
        on_peers: Callable[[list[Peer]], None] | None = None,
        on_drain: Callable[[str], None] | None = None,
        prefixes: PrefixSource | None = None,
        credits: CreditSource | None = None,
        accept_timeout_s: float = 10.0,
        security: Security = PLAIN,
    ) -> None:
        self.router_address = router_address
        self._hello = hello
        self._heartbeat = heartbeat
        self._assets = assets
        self._on_peers = on_peers
        self._on_drain = on_drain
        self._prefixes = prefixes
        self._credits = credits
        self._accept_timeout_s = accept_timeout_s
        self._security = security
        self._was_accepted = False
        self._accepted = asyncio.Event()
        self._closed = asyncio.Event()
        self._wake = asyncio.Event()
        self._beat_at = 0.0
        self._problem = ""

    @property
    def registered(self) -> bool:
        """Whether the router has accepted this instance and the stream to it is alive."""
        return self._accepted.is_set()

    async def wait_registered(self) -> None:
        """Returns once the router has accepted this instance."""
        await self._accepted.wait()

    def beat(self) -> None:
        """Has the next heartbeat go out now: what it says has changed."""
        self._beat_at = 0.0
        self._wake.set()

    def close(self) -> None:
        """Makes `run` end the stream and return; the router then forgets the instance."""
        self._closed.set()

    async def run(self) -> None:
        """Stays registered until `close`, reconnecting for ever.

        Raises `RegistrationRefused` where the router refuses the instance as such.
        """
        closed = asyncio.create_task(self._closed.wait())
        stream: asyncio.Task[bool] | None = None
        delay_s = _FIRST_DELAY_S
        try:
            while not closed.done():
                stream = asyncio.create_task(self._one_stream())
                await asyncio.wait([stream, closed], return_when=asyncio.FIRST_COMPLETED)
                if stream.done():
                    delay_s = _FIRST_DELAY_S if stream.result() else delay_s
                    await asyncio.wait([closed], timeout=delay_s * random.uniform(0.75, 1.25))
                    delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
        finally:
            tasks = [closed] if stream is None else [closed, stream]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one_stream(self) -> bool:
        """Runs one stream to its end; returns whether it held for a while."""
        began = time.monotonic()
        channel = dial(self.router_address, security=self._security)
        try:
            call = MembershipStub(channel).Register()
            await self._converse(call)
        except Exception as exc:
            final = _FINAL if self._was_accepted else (*_FINAL, *_NOT_LET_IN)
            self._lost(_problem_of(exc, self.router_address, final))
        finally:
            held = self.registered and time.monotonic() - began > _LONGEST_DELAY_S
            self._accepted.clear()
            await channel.close(None)
        return held

    async def _converse(self, call: _Call) -> None:
        try:
            async with asyncio.timeout(self._accept_timeout_s):
                await _write(call, RegisterRequest(hello=self._hello))
                accepted = await self._read_accepted(call)
        except TimeoutError as exc:
            raise _Lost("does not answer") from exc
        self._accepted.set()
        self._was_accepted = True
        self._problem = ""
        _log.info("registered with router %s", self.router_address)
        with self._credit_line(accepted) as line:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send(call, accepted, line))
                await self._receive(call, accepted, line)

    @contextmanager
    def _credit_line(self, accepted: Accepted) -> Iterator[CreditLine | None]:
        if self._credits is None or not accepted.credits:
            yield None
            return
        with closing(self._credits.begin(accepted.router_id, self._wake.set)) as line:
            yield line

    async def _read_accepted(self, call: _Call) -> Accepted:
        while True:
            response = await _read(call)
            if response.WhichOneof("kind") == "accepted":
                return response.accepted
            self._dispatch(response)

    async def _receive(self, call: _Call, accepted: Accepted, line: CreditLine | None) -> None:
        if line is None:
            while True:
                self._dispatch(await _read(call))
        interval_s = _interval_s(accepted)
        missed = 0
        while True:
            reading = asyncio.ensure_future(_read(call))
            try:
                # Silence counts while this loop is awake: what came meanwhile waits here.
                while not (await asyncio.wait({reading}, timeout=interval_s))[0]:
                    missed += 1
                    if missed == _ANSWERS_MISSED:
                        raise _Lost(f"has not answered for {missed * interval_s:g} s")
                response = reading.result()
            finally:
                reading.cancel()
            missed = 0
            if response.WhichOneof("kind") == "credit_use":
                _take_use(line, response.credit_use)
            else:
                self._dispatch(response)

    def _dispatch(self, response: RegisterResponse) -> None:
        match response.WhichOneof("kind"):
            case "peers" if self._on_peers is not None:
                self._on_peers(list(response.peers.peers))
            case "drain" if self._on_drain is not None:
                self._on_drain(response.drain.reason)
            case _:
                pass

    async def _send(self, call: _Call, accepted: Accepted, line: CreditLine | None) -> None:
        interval_s = _interval_s(accepted)
        prefixes = self._prefixes if accepted.prefix_events else None
        if prefixes is not None:
            prefixes.restart()
        prefixes_interval_s = PREFIX_INTERVAL_S if prefixes is not None else math.inf
        self._beat_at = prefixes_due = 0.0
        # Heartbeats go between the chunks: assets may take longer than a router's patience.
        chunks = asset_chunks(self._assets()) if accepted.send_assets else iter(())
        while True:
            now = time.monotonic()
            if now >= self._beat_at:
                self._beat_at = now + interval_s
                await _write(call, RegisterRequest(heartbeat=self._heartbeat()))
                self._wake.set()  # a credit goes with each, for the router to answer
            if self._wake.is_set():
                self._wake.clear()
                if line is not None:
                    await _write(call, RegisterRequest(credit=line.credit()))
            if now >= prefixes_due:
                events = prefixes.next_events() if prefixes is not None else None
                if events is not None:
                    await _write(call, RegisterRequest(prefixes=events))
                prefixes_due = now + prefixes_interval_s
            chunk = next(chunks, None)
            if chunk is not None:
                await _write(call, RegisterRequest(assets=chunk))
            else:
                with suppress(TimeoutError):
                    due = min(self._beat_at, prefixes_due)
                    async with asyncio.timeout(due - time.monotonic()):
                        await self._wake.wait()

    def _lost(self, problem: str) -> None:
        if problem != self._problem:
            _log.warning("router %s %s, retrying", self.router_address, problem)
        self._problem = problem


class _Lost(Exception):
    """The stream is over; the message completes the sentence "the router ..."."""


def _problem_of(exc: Exception, router_address: str, final: tuple[type[ServiceError], ...]) -> str:
    """Says in plain words why a stream ended; raises where trying again is in vain."""
    for cause in leaves(exc):
        if isinstance(cause, _Lost):
            return str(cause)
        if isinstance(cause, grpc.aio.AioRpcError):
            error = from_rpc_error(cause)
            if isinstance(error, final):
                raise RegistrationRefused(
                    f"router {router_address} refused this instance: {error.message}"
                ) from exc
            if isinstance(error, Unavailable | DeadlineExceeded):
                return "is not reachable"
            if error.reason == "UNIMPLEMENTED":
                return "is some other gRPC server, not a Twinpool router"
            return f"has an error ({error.message})"
    raise exc


def _interval_s(accepted: Accepted) -> float:
    return max(accepted.heartbeat_interval_ms, 10) / 1000


def _take_use(line: CreditLine, use: CreditUse) -> None:
    try:
        line.take(use)
    except ValueError as exc:
        raise _Lost(f"answers a credit that it was not given ({exc})") from exc


async def _read(call: _Call) -> RegisterResponse:
    response = await call.read()
    if response is grpc.aio.EOF:
        raise _Lost("ended the registration")
    return cast(RegisterResponse, response)


async def _write(call: _Call, request: RegisterRequest) -> None:
    try:
        await call.write(request)
    except asyncio.InvalidStateError:
        # The call is over already; reading says why.
        await _read(call)


def asset_chunks(files: Mapping[str, bytes]) -> Iterator[AssetsChunk]:
    """Cuts text assets into messages of at most `ASSETS_CHUNK_BYTES`, the last one marked."""
    pieces = [
        (name, data[begin : begin + ASSETS_CHUNK_BYTES])
        for name, data in files.items()
        for begin in range(0, max(len(data), 1), ASSETS_CHUNK_BYTES)
    ] or [("", b"")]
    for index, (name, data) in enumerate(pieces):
        yield AssetsChunk(file=name, data=data, last=index == len(pieces) - 1)
