"""One instance and many routers: found by list or name, with what they say put together."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydantic import ValidationError
from twinpool.v1.worker_pb2 import (
    Accepted,
    DrainCommand,
    Heartbeat,
    InstanceHello,
    Peer,
    Peers,
    RegisterRequest,
    RegisterResponse,
)

from service.errors import Incompatible
from service.instance_config import InstanceConfig
from service.registration import RegistrationRefused
from service.routers import Routers, resolve
from tests.unit.service.test_registration import Router, Script, accepting, raising, serving


def peers(*known: tuple[str, int]) -> RegisterResponse:
    return RegisterResponse(peers=Peers(peers=[Peer(name=n, epoch=e) for n, e in known]))


def address(port: int) -> str:
    return f"127.0.0.1:{port}"


class Instance:
    """What an instance hears of its routers."""

    def __init__(self, *routers: str, **options: Any) -> None:
        self.peers: dict[str, int] = {}
        self.drains: list[str] = []
        self.routers = Routers(
            routers=routers,
            hello=InstanceHello(name="i", epoch=1),
            heartbeat=Heartbeat,
            assets=dict,
            on_peers=self._take_peers,
            on_drain=self.drains.append,
            look_up_s=0.02,
            **options,
        )

    def _take_peers(self, found: Sequence[Peer]) -> None:
        self.peers = {peer.name: peer.epoch for peer in found}

    @asynccontextmanager
    async def running(self) -> AsyncIterator["asyncio.Task[None]"]:
        task = asyncio.create_task(self.routers.run())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_peers_of_all_routers_are_put_together_the_latest_life_of_each() -> None:
    first = Router(accepting(peers(("a", 1), ("b", 5))))
    second = Router(accepting(peers(("b", 6), ("c", 1))))
    async with serving(first) as one, serving(second) as two:
        instance = Instance(address(one.port), address(two.port))
        async with instance.running():
            await until(lambda: instance.peers == {"a": 1, "b": 6, "c": 1})
            assert instance.routers.registered == 2


def until_set(stops: asyncio.Event) -> Script:
    """Accepts, and ends the stream in time."""

    async def script(
        router: Router, requests: AsyncIterator[RegisterRequest]
    ) -> AsyncIterator[RegisterResponse]:
        await router.record(await anext(requests))
        yield RegisterResponse(accepted=Accepted(router_id="r", heartbeat_interval_ms=20))
        await stops.wait()

    return script


async def test_drain_by_one_router_drains_the_instance() -> None:
    drain = RegisterResponse(drain=DrainCommand(reason="now"))
    async with serving(Router(accepting())) as one, serving(Router(accepting(drain))) as two:
        instance = Instance(address(one.port), address(two.port))
        async with instance.running():
            await until(lambda: instance.drains == ["now"])


async def test_routers_of_a_name_are_followed_as_they_come_and_go() -> None:
    found: list[str] = []

    async def look_up(host: str, port: int) -> list[str]:
        assert (host, port) == ("routers.local", 9000)
        if not found:
            raise OSError(1, "no such name")
        return list(found)

    stops = asyncio.Event()
    first, second = Router(until_set(stops)), Router(accepting())
    async with serving(first) as one, serving(second) as two:
        instance = Instance("dns:routers.local:9000", look_up=look_up)
        async with instance.running():
            found[:] = [address(one.port)]
            await until(lambda: instance.routers.registered == 1)
            found[:] = [address(one.port), address(two.port)]
            await until(lambda: instance.routers.registered == 2)
            found[:] = [address(two.port)]
            # It may have requests to end.
            await asyncio.sleep(0.1)
            assert instance.routers.registered == 2
            stops.set()
            await until(lambda: instance.routers.addresses == [address(two.port)])
            # A name that is not found for a while takes nobody away.
            found.clear()
            await asyncio.sleep(0.1)
            assert instance.routers.registered == 1
            assert len(first.streams) == len(second.streams) == 1


async def test_refusal_by_one_router_leaves_the_others() -> None:
    refusing = Router(raising(Incompatible("another model is served", reason="OTHER_MODEL")))
    async with serving(Router(accepting())) as one, serving(refusing) as two:
        instance = Instance(address(one.port), address(two.port))
        async with instance.running() as task:
            await until(lambda: instance.routers.addresses == [address(one.port)])
            await until(lambda: instance.routers.registered == 1)
            assert not task.done()


async def test_refusal_by_the_only_router_ends_the_instance() -> None:
    refusing = Router(raising(Incompatible("another model is served", reason="OTHER_MODEL")))
    async with serving(refusing) as only:
        instance = Instance(address(only.port))
        async with instance.running() as task:
            with pytest.raises(RegistrationRefused):
                await asyncio.wait_for(task, 10)


async def test_name_resolves_to_addresses_with_the_port() -> None:
    assert "127.0.0.1:9000" in await resolve("localhost", 9000)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a:1", ("a:1",)),
        ("a:1, b:2", ("a:1", "b:2")),
        (["a:1,b:2", "dns:c:3"], ("a:1", "b:2", "dns:c:3")),
    ],
)
def test_routers_are_given_repeated_or_by_commas(given: object, expected: tuple[str, ...]) -> None:
    config = InstanceConfig.model_validate({"model": ".", "router": given})
    assert config.router == expected


@pytest.mark.parametrize(
    "given", ["a", "a:", ":1", "a:x", "a:70000", "dns:a", "a:1,a:1", [], "a:1,"]
)
def test_router_that_is_no_address_is_refused(given: object) -> None:
    with pytest.raises(ValidationError, match="router"):
        InstanceConfig.model_validate({"model": ".", "router": given})
