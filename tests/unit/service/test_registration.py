import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from twinpool.v1 import worker_pb2_grpc
from twinpool.v1.worker_pb2 import (
    Accepted,
    Credit,
    CreditUse,
    DrainCommand,
    DrainRequest,
    DrainResponse,
    GetStatusRequest,
    GetStatusResponse,
    Heartbeat,
    InstanceHello,
    Peer,
    Peers,
    PrefixEvents,
    RegisterRequest,
    RegisterResponse,
)

from service.errors import (
    Incompatible,
    InvalidRequest,
    PermissionDenied,
    ServiceError,
    Unauthenticated,
    Unavailable,
)
from service.lifecycle import Server
from service.registration import ASSETS_CHUNK_BYTES, Registration, RegistrationRefused

Script = Callable[["Router", AsyncIterator[RegisterRequest]], AsyncIterator[RegisterResponse]]


class Router(worker_pb2_grpc.MembershipServicer):
    """Plays one script for each stream, the last one again and again; keeps what it was sent."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = scripts
        self.streams: list[list[RegisterRequest]] = []
        self.progress = asyncio.Condition()

    async def Register(
        self, requests: AsyncIterator[RegisterRequest], context: Any
    ) -> AsyncIterator[RegisterResponse]:
        script = self._scripts[min(len(self.streams), len(self._scripts) - 1)]
        self.streams.append([])
        async for response in script(self, requests):
            yield response

    async def record(self, request: RegisterRequest) -> None:
        async with self.progress:
            self.streams[-1].append(request)
            self.progress.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10), self.progress:
            await self.progress.wait_for(condition)

    def kinds(self, stream: int) -> list[str | None]:
        if stream >= len(self.streams):
            return []
        return [request.WhichOneof("kind") for request in self.streams[stream]]

    async def Drain(self, request: DrainRequest, context: Any) -> DrainResponse:
        raise NotImplementedError

    async def GetStatus(self, request: GetStatusRequest, context: Any) -> GetStatusResponse:
        raise NotImplementedError


def accepting(
    *extra: RegisterResponse,
    send_assets: bool = False,
    prefix_events: bool = False,
    credits: bool = False,
    answer: Callable[[Credit], RegisterResponse | None] = lambda _: None,
    drop_after: int = 0,
    interval_ms: int = 20,
) -> Script:
    async def script(
        router: Router, requests: AsyncIterator[RegisterRequest]
    ) -> AsyncIterator[RegisterResponse]:
        await router.record(await anext(requests))
        accepted = Accepted(
            router_id="r",
            heartbeat_interval_ms=interval_ms,
            send_assets=send_assets,
            prefix_events=prefix_events,
            credits=credits,
        )
        yield RegisterResponse(accepted=accepted)
        for response in extra:
            yield response
        count = 0
        async for request in requests:
            await router.record(request)
            if request.WhichOneof("kind") == "credit":
                answered = answer(request.credit)
                if answered is not None:
                    yield answered
            count += 1
            if count == drop_after:
                return

    return script


def raising(error: Exception) -> Script:
    async def script(
        router: Router, requests: AsyncIterator[RegisterRequest]
    ) -> AsyncIterator[RegisterResponse]:
        await router.record(await anext(requests))
        raise error
        yield

    return script


async def silent(
    router: Router, requests: AsyncIterator[RegisterRequest]
) -> AsyncIterator[RegisterResponse]:
    async for request in requests:
        await router.record(request)
    return
    yield


@asynccontextmanager
async def serving(router: Router, port: int = 0) -> AsyncIterator[Server]:
    server = Server("router", port=port)
    server.add(worker_pb2_grpc.add_MembershipServicer_to_server, router, "twinpool.v1.Membership")
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def registration(address: str, **kwargs: Any) -> Registration:
    return Registration(
        router_address=address,
        hello=InstanceHello(name="decode-1", epoch=7),
        heartbeat=kwargs.pop("heartbeat", lambda: Heartbeat(running=3)),
        assets=kwargs.pop("assets", dict),
        **kwargs,
    )


@asynccontextmanager
async def running(worker: Registration) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        worker.close()
        async with asyncio.timeout(10):
            await asyncio.gather(task, return_exceptions=True)


@contextmanager
def info_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, logger="service.registration"):
        yield


async def test_hello_comes_first_then_heartbeats_at_the_routers_interval() -> None:
    router = Router(accepting())
    async with serving(router) as server:
        worker = registration(server.address)
        async with running(worker):
            await router.until(lambda: len(router.kinds(0)) >= 4)
            assert worker.registered
    assert router.streams[0][0].hello.name == "decode-1"
    assert set(router.kinds(0)[1:]) == {"heartbeat"}
    assert router.streams[0][1].heartbeat.running == 3


async def test_heartbeat_that_is_asked_for_waits_for_no_interval() -> None:
    running_now = [1]
    router = Router(accepting(interval_ms=3_600_000))
    async with serving(router) as server:
        worker = registration(server.address, heartbeat=lambda: Heartbeat(running=running_now[-1]))
        async with running(worker):
            await router.until(lambda: len(router.kinds(0)) == 2)
            running_now.append(2)
            worker.beat()
            await router.until(lambda: len(router.kinds(0)) == 3)
    assert [each.heartbeat.running for each in router.streams[0][1:]] == running_now


async def test_assets_go_in_bounded_chunks_when_the_router_asks() -> None:
    files = {"tokenizer.json": b"x" * (2 * ASSETS_CHUNK_BYTES + 5), "empty": b"", "t.jinja": b"t"}
    router = Router(accepting(send_assets=True))

    def chunks() -> list[Any]:
        return [r.assets for r in router.streams[0] if r.WhichOneof("kind") == "assets"]

    async with (
        serving(router) as server,
        running(registration(server.address, assets=lambda: files)),
    ):
        await router.until(lambda: bool(router.streams and chunks() and chunks()[-1].last))
        await router.until(lambda: router.kinds(0)[-1] == "heartbeat")
    received: dict[str, bytes] = {}
    for chunk in chunks():
        assert len(chunk.data) <= ASSETS_CHUNK_BYTES
        received[chunk.file] = received.get(chunk.file, b"") + chunk.data
    assert received == files
    assert [chunk.last for chunk in chunks()] == [False] * (len(chunks()) - 1) + [True]


class Prefixes:
    """Has one message to tell after each restart, and then another."""

    def __init__(self) -> None:
        self.told = 0

    def restart(self) -> None:
        self.told = 0

    def next_events(self) -> PrefixEvents | None:
        self.told += 1
        if self.told > 2:
            return None
        return PrefixEvents(sequence=self.told, reset=self.told == 1, stored=[self.told])


def prefixes(router: Router, stream: int) -> list[tuple[bool, list[int]]]:
    if stream >= len(router.streams):
        return []
    events = [r.prefixes for r in router.streams[stream] if r.WhichOneof("kind") == "prefixes"]
    return [(each.reset, list(each.stored)) for each in events]


async def test_prefix_events_start_over_with_each_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.registration.PREFIX_INTERVAL_S", 0.01)
    router = Router(accepting(prefix_events=True, drop_after=5), accepting(prefix_events=True))
    async with (
        serving(router) as server,
        running(registration(server.address, prefixes=Prefixes())),
    ):
        await router.until(lambda: len(prefixes(router, 1)) == 2)
        await router.until(lambda: router.kinds(1)[-1] == "heartbeat")
    assert prefixes(router, 0) == prefixes(router, 1) == [(True, [1]), (False, [2])]


async def test_router_that_does_not_take_prefix_events_gets_none() -> None:
    router, source = Router(accepting()), Prefixes()
    async with (
        serving(router) as server,
        running(registration(server.address, prefixes=source)),
    ):
        await router.until(lambda: len(router.kinds(0)) >= 4)
    assert set(router.kinds(0)[1:]) == {"heartbeat"}
    assert source.told == 0


async def test_peers_and_drain_reach_their_callbacks() -> None:
    peers = RegisterResponse(peers=Peers(peers=[Peer(name="decode-2", epoch=1)]))
    drain = RegisterResponse(drain=DrainCommand(reason="maintenance"))
    router = Router(accepting(peers, drain))
    seen: list[Any] = []
    async with serving(router) as server:
        worker = registration(server.address, on_peers=seen.append, on_drain=seen.append)
        async with running(worker):
            await router.until(lambda: len(seen) == 2)
    assert [peer.name for peer in seen[0]] == ["decode-2"]
    assert seen[1] == "maintenance"


@pytest.mark.parametrize(
    "error",
    [
        Incompatible("it serves 'a', this is 'b'"),
        InvalidRequest("layout", "tp3", "unknown"),
        Unauthenticated("the token is not known here"),
        PermissionDenied("the token has not the right"),
    ],
)
async def test_refused_registration_is_final(error: ServiceError) -> None:
    router = Router(raising(error))
    async with serving(router) as server:
        with pytest.raises(RegistrationRefused) as caught:
            async with asyncio.timeout(10):
                await registration(server.address).run()
    assert error.message in str(caught.value)
    assert len(router.streams) == 1


async def test_token_that_was_good_once_is_tried_again_while_tokens_change() -> None:
    router = Router(
        accepting(drop_after=1), raising(Unauthenticated("not known here")), accepting()
    )
    async with serving(router) as server, running(registration(server.address)):
        await router.until(lambda: "heartbeat" in router.kinds(2))
    assert router.kinds(1) == ["hello"]


async def test_dropped_stream_is_opened_again_with_a_hello() -> None:
    router = Router(accepting(drop_after=2), raising(Unavailable("busy")), accepting())
    async with serving(router) as server:
        worker = registration(server.address)
        async with running(worker):
            await router.until(lambda: len(router.kinds(2)) >= 3)
            assert worker.registered
    assert [router.kinds(stream)[0] for stream in range(3)] == ["hello"] * 3


async def test_router_that_comes_late_is_found_and_silence_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(Router(accepting())) as server:
        port = server.port
    router = Router(accepting())
    with info_log(caplog):
        async with running(registration(f"127.0.0.1:{port}")):
            await asyncio.sleep(0.6)
            async with serving(router, port):
                await router.until(lambda: len(router.kinds(0)) >= 2)
    assert [record.getMessage() for record in caplog.records][:2] == [
        f"router 127.0.0.1:{port} is not reachable, retrying",
        f"registered with router 127.0.0.1:{port}",
    ]


async def test_router_that_never_accepts_is_given_up_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    router = Router(silent, accepting())
    with info_log(caplog):
        async with (
            serving(router) as server,
            running(registration(server.address, accept_timeout_s=0.1)),
        ):
            await router.until(lambda: len(router.kinds(1)) >= 2)
    assert "does not answer, retrying" in caplog.text


async def test_server_that_is_no_router_is_named_as_such(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Server("other")
    await server.start()
    with info_log(caplog):
        async with running(registration(server.address)):
            await asyncio.sleep(0.5)
    await server.stop()
    assert "is some other gRPC server, not a Twinpool router" in caplog.text


async def test_close_ends_the_stream_and_run() -> None:
    router = Router(accepting())
    async with serving(router) as server:
        worker = registration(server.address)
        task = asyncio.create_task(worker.run())
        async with asyncio.timeout(10):
            await worker.wait_registered()
            worker.close()
            await task
        assert not worker.registered


async def test_cancel_ends_run() -> None:
    router = Router(accepting())
    async with serving(router) as server:
        worker = registration(server.address)
        task = asyncio.create_task(worker.run())
        async with asyncio.timeout(10):
            await worker.wait_registered()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_defect_in_a_callback_is_raised() -> None:
    def broken(peers: list[Peer]) -> None:
        raise RuntimeError("a defect")

    router = Router(accepting(RegisterResponse(peers=Peers())))
    async with serving(router) as server:
        with pytest.raises((RuntimeError, ExceptionGroup)):
            async with asyncio.timeout(10):
                await registration(server.address, on_peers=broken).run()


class Credits:
    """Grants one block more each time that it is woken, and keeps what was answered."""

    def __init__(self) -> None:
        self.routers: list[str] = []
        self.serial = 0
        self.answered: list[int] = []
        self.closed = 0
        self.wake: Callable[[], None] = lambda: None

    def begin(self, router_id: str, wake: Callable[[], None]) -> "Credits":
        self.routers.append(router_id)
        self.wake = wake
        return self

    def credit(self) -> Credit:
        return Credit(serial=self.serial, blocks=[self.serial])

    def take(self, use: CreditUse) -> None:
        if use.serial > self.serial:
            raise ValueError("no such serial")
        self.answered.append(use.serial)

    def close(self) -> None:
        self.closed += 1


def used(credit: Credit, *, ahead: int = 0) -> RegisterResponse:
    return RegisterResponse(credit_use=CreditUse(serial=credit.serial + ahead))


def credits_of(router: Router, stream: int) -> list[int]:
    if stream >= len(router.streams):
        return []
    found = router.streams[stream]
    return [r.credit.serial for r in found if r.WhichOneof("kind") == "credit"]


async def test_credit_goes_out_on_change_and_with_heartbeats_and_answers_come_back() -> None:
    router, credits = Router(accepting(credits=True, answer=used)), Credits()
    async with serving(router) as server:
        async with running(registration(server.address, credits=credits)):
            await router.until(lambda: len(credits_of(router, 0)) >= 2)
            credits.serial = 5
            credits.wake()
            await router.until(lambda: credits_of(router, 0)[-1] == 5)
            async with asyncio.timeout(10):
                while 5 not in credits.answered:
                    await asyncio.sleep(0.01)
        assert credits.routers == ["r"]
        assert credits.closed == 1


async def test_router_that_knows_no_credits_gets_none() -> None:
    router, credits = Router(accepting()), Credits()
    async with serving(router) as server, running(registration(server.address, credits=credits)):
        await router.until(lambda: len(router.kinds(0)) >= 4)
    assert "credit" not in router.kinds(0)
    assert credits.routers == []


async def test_router_that_stops_answering_is_lost_and_its_credit_comes_back() -> None:
    router, credits = Router(accepting(credits=True)), Credits()
    async with serving(router) as server, running(registration(server.address, credits=credits)):
        await router.until(lambda: len(router.streams) == 2)
        assert credits.closed >= 1


async def test_router_with_a_wrong_answer_is_lost() -> None:
    def wrong(credit: Credit) -> RegisterResponse:
        return used(credit, ahead=1)

    router, credits = Router(accepting(credits=True, answer=wrong)), Credits()
    async with serving(router) as server, running(registration(server.address, credits=credits)):
        await router.until(lambda: len(router.streams) == 2)
        assert credits.closed >= 1
    assert credits.answered == []
