"""A prefill instance is late: another is asked as well, and decode takes from one alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.unit.router.fakes import FakeDecode, FakePrefill
from tests.unit.router.system import System, collect, running, text_of, until


@asynccontextmanager
async def hedging() -> AsyncIterator[tuple[System, FakePrefill, FakePrefill, FakeDecode]]:
    """Two prefill instances, of which the first gets requests; how long they take is known."""
    async with running(hedge_prefill=2.0) as system:
        first = await system.add_prefill("a")
        decode = await system.add_decode()
        for _ in range(8):
            await collect(system.generate(max_new_tokens=2))
        second = await system.add_prefill("b")
        await system.settled()
        yield system, first, second, decode


def hedges(system: System, outcome: str) -> float | None:
    labels = {"outcome": outcome}
    return system.sample("twinpool_router_hedges_total", labels)


async def test_second_instance_answers_where_the_first_is_stuck() -> None:
    async with hedging() as (system, first, _second, decode):
        first.compute_gate.clear()
        messages = await collect(system.generate(max_new_tokens=5))
        assert text_of(messages) == "hello"
        assert messages[-1].stats.prefill_instance == "b"
        assert messages[-1].stats.retries == 0
        assert (hedges(system, "won"), hedges(system, "lost")) == (1, 0)
        assert [regrant.prefill_instance for regrant in decode.regrants] == ["b"]
        first.compute_gate.set()
        await system.settled()
        assert len(first.aborted) == 1
        labels = {"outcome": "resumed"}
        assert system.sample("twinpool_router_resumes_total", labels) == 0


async def test_first_instance_that_is_late_but_faster_keeps_the_request() -> None:
    async with hedging() as (system, first, second, decode):
        first.compute_gate.clear()
        second.compute_gate.clear()
        call = asyncio.ensure_future(collect(system.generate(max_new_tokens=5)))
        await until(lambda: bool(second.open))
        # Nobody may send for the second one as long as it has not won.
        assert decode.regrants == []
        first.compute_gate.set()
        messages = await call
        assert text_of(messages) == "hello"
        assert messages[-1].stats.prefill_instance == "a"
        assert (hedges(system, "won"), hedges(system, "lost")) == (0, 1)
        assert decode.regrants == []
        second.compute_gate.set()
        await system.settled()
        assert len(second.aborted) == 1


async def test_second_instance_takes_over_where_the_first_dies() -> None:
    async with hedging() as (system, first, second, _):
        first.compute_gate.clear()
        second.compute_gate.clear()
        call = asyncio.ensure_future(collect(system.generate(max_new_tokens=5)))
        await until(lambda: bool(second.open))
        await first.die()
        second.compute_gate.set()
        messages = await call
        assert text_of(messages) == "hello"
        assert (messages[-1].stats.prefill_instance, len(second.starts)) == ("b", 1)
        await system.settled()


async def test_second_instance_that_dies_is_no_loss() -> None:
    async with hedging() as (system, first, second, _):
        first.compute_gate.clear()
        second.compute_gate.clear()
        call = asyncio.ensure_future(collect(system.generate(max_new_tokens=5)))
        await until(lambda: bool(second.open))
        await second.die()
        await until(lambda: hedges(system, "lost") == 1)
        first.compute_gate.set()
        messages = await call
        assert text_of(messages) == "hello"
        assert messages[-1].stats.retries == 0
        await system.settled()


async def test_prompt_that_prefill_alone_answers_is_hedged_too() -> None:
    async with hedging() as (system, first, _second, _):
        first.compute_gate.clear()
        messages = await collect(system.generate(max_new_tokens=1))
        assert text_of(messages) == "h"
        assert messages[-1].stats.prefill_instance == "b"
        first.compute_gate.set()
        await system.settled()


async def test_client_that_leaves_ends_both() -> None:
    async with hedging() as (system, first, second, _):
        first.compute_gate.clear()
        second.compute_gate.clear()
        call = system.generate(max_new_tokens=5)
        await until(lambda: bool(second.open))
        call.cancel()
        await until(lambda: bool(first.aborted) and bool(second.aborted))
        first.compute_gate.set()
        second.compute_gate.set()
        await system.settled()


async def test_only_instance_is_not_asked_twice() -> None:
    async with hedging() as (system, first, second, _):
        await second.die()
        await until(lambda: len(system.group.ledger.prefills()) == 1)
        first.compute_gate.clear()
        call = asyncio.ensure_future(collect(system.generate(max_new_tokens=5)))
        await until(lambda: hedges(system, "no room") == 1)
        first.compute_gate.set()
        assert text_of(await call) == "hello"
        assert len(first.starts) == 9
        await system.settled()


async def test_enough_is_hedged_where_a_twentieth_is() -> None:
    async with hedging() as (system, first, second, _):
        first.compute_gate.clear()
        second.compute_gate.clear()
        calls = [
            asyncio.ensure_future(collect(system.generate(max_new_tokens=5))) for _ in range(4)
        ]
        await until(lambda: (hedges(system, "spent") or 0) >= 3)
        first.compute_gate.set()
        second.compute_gate.set()
        for call in calls:
            assert text_of(await call) == "hello"
        await system.settled()
