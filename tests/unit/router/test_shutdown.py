"""A router that stops: what is refused, what is finished, what is left behind."""

import asyncio

from service.errors import Unavailable
from tests.unit.router.system import collect, error_of, pair, text_of


async def test_drain_refuses_what_is_new_and_finishes_what_runs() -> None:
    async with pair() as (system, _, decode):
        decode.step_gate.clear()
        call = system.generate(max_new_tokens=5)
        first = await call.read()
        drain = asyncio.ensure_future(system.router.drain())
        await asyncio.sleep(0)
        error = await error_of(system.generate(max_new_tokens=5))
        assert isinstance(error, Unavailable)
        assert error.reason == "ROUTER_STOPS"
        assert not drain.done()
        decode.step_gate.set()
        assert text_of([first, *await collect(call)]) == "hello"
        await drain


async def test_no_task_is_left_after_the_end() -> None:
    before = asyncio.all_tasks()
    async with pair() as (system, _, decode):
        await collect(system.generate(max_new_tokens=5))
        decode.step_gate.clear()
        call = system.generate(max_new_tokens=500)
        await call.read()
        call.cancel()
    assert {t for t in asyncio.all_tasks() - before if "router/" in repr(t)} == set()
