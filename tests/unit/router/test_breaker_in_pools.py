"""An instance that fails one request after the other gets nothing for a while, then one."""

import asyncio

import grpc
import pytest

from router.breaker import BreakerSettings, State
from router.ledger import InstanceKey
from service.errors import WorkFailed
from tests.unit.router.fakes import FakePrefill
from tests.unit.router.system import System, collect, running, text_of, until

QUICK = BreakerSettings(least=3, last=8, pause_s=0.05, jitter=0.0)


def transitions(system: System, to: State) -> float | None:
    labels = {"to": to.value}
    return system.sample("twinpool_router_breaker_transitions_total", labels)


def usable(system: System) -> set[str]:
    return {view.key.name for view in system.group.ledger.prefills()}


def fail_always(prefill: FakePrefill, times: int = 100) -> None:
    prefill.errors = [
        WorkFailed("out of memory", reason="OOM", retryable=True) for _ in range(times)
    ]


async def answer(system: System) -> str:
    return text_of(await collect(system.generate(max_new_tokens=5)))


async def test_failing_instance_is_left_out_then_tried_and_used_again() -> None:
    async with running(breaker=QUICK) as system:
        bad = await system.add_prefill("a")
        await system.add_prefill("b")
        await system.add_decode()
        fail_always(bad)
        while not transitions(system, State.OPEN):
            assert await answer(system) == "hello"
        assert len(bad.starts) >= QUICK.least
        # Each time that it is tried it fails, and is left out for longer.
        while (transitions(system, State.OPEN) or 0) < 3:
            assert await answer(system) == "hello"
            await asyncio.sleep(0.01)
        bad.errors.clear()
        while not transitions(system, State.CLOSED):
            assert await answer(system) == "hello"
            await asyncio.sleep(0.01)
        await until(lambda: usable(system) == {"a", "b"})
        await system.settled()


async def test_one_that_is_tried_gets_one_request_alone() -> None:
    async with running(breaker=QUICK) as system:
        bad = await system.add_prefill("a")
        await system.add_prefill("b")
        await system.add_decode()
        fail_always(bad)
        while not transitions(system, State.OPEN):
            await answer(system)
        bad.errors.clear()
        bad.compute_gate.clear()
        tried = len(bad.starts)
        await until(lambda: transitions(system, State.HALF_OPEN) == 1)
        calls = [asyncio.ensure_future(answer(system)) for _ in range(6)]
        await until(lambda: bool(bad.open) and sum(call.done() for call in calls) == 5)
        assert len(bad.starts) == tried + 1
        assert usable(system) == {"b"}
        bad.compute_gate.set()
        for call in calls:
            assert await call == "hello"
        assert usable(system) == {"a", "b"}
        await system.settled()


async def test_one_whose_try_left_is_tried_again() -> None:
    async with running(breaker=QUICK) as system:
        bad = await system.add_prefill("a")
        await system.add_prefill("b")
        await system.add_decode()
        fail_always(bad)
        while not transitions(system, State.OPEN):
            await answer(system)
        bad.errors.clear()
        bad.compute_gate.clear()
        await until(lambda: transitions(system, State.HALF_OPEN) == 1)
        call = system.generate(max_new_tokens=5)
        await until(lambda: usable(system) == {"b"})
        call.cancel()
        await until(lambda: usable(system) == {"a", "b"})
        bad.compute_gate.set()
        await system.settled()


async def test_last_instance_is_used_whatever_it_does() -> None:
    async with running(breaker=QUICK, max_retries=0) as system:
        bad = await system.add_prefill("a")
        await system.add_decode()
        fail_always(bad, 6)
        for _ in range(6):
            try:
                await answer(system)
            except grpc.aio.AioRpcError:
                await until(lambda: usable(system) == {"a"})
        assert transitions(system, State.OPEN) == 0
        assert await answer(system) == "hello"
        await system.settled()


async def test_open_instance_is_used_again_where_the_others_leave() -> None:
    slow = BreakerSettings(least=3, pause_s=1000.0, longest_pause_s=1000.0)
    async with running(breaker=slow) as system:
        bad = await system.add_prefill("a")
        good = await system.add_prefill("b")
        await system.add_decode()
        fail_always(bad)
        while not transitions(system, State.OPEN):
            await answer(system)
        await until(lambda: usable(system) == {"b"})
        bad.errors.clear()
        await good.die()
        await until(lambda: usable(system) == {"a"})
        assert system.group.pools.is_up(InstanceKey("a", bad.epoch))
        assert await answer(system) == "hello"
        await system.settled()


def suspended(system: System) -> set[str]:
    """Instances that failures have left out, and that have not been tried again since."""
    breakers = system.group.pools._breakers
    return {
        i.name
        for i in system.instances
        if breakers.state(InstanceKey(i.name, i.epoch)) is State.OPEN
    }


@pytest.mark.parametrize("bad", ["p1", "d1"])
async def test_lost_transfers_open_the_instance_that_is_bad_alone(bad: str) -> None:
    slow = BreakerSettings(least=3, last=8, pause_s=1000.0, longest_pause_s=1000.0)
    async with running(breaker=slow, policy="round-robin") as system:
        prefills = {name: await system.add_prefill(name) for name in ("p1", "p2")}
        decodes = {name: await system.add_decode(name) for name in ("d1", "d2")}
        if bad == "p1":
            prefills[bad].fail_transfer = True
        else:
            decodes[bad].loses_transfers = True
        for _ in range(40):
            assert await answer(system) == "hello"
        assert suspended(system) == {bad}
        await system.settled()
