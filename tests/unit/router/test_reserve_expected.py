"""What decode takes beyond a reservation is booked, and what answers come to is learned."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from twinpool.v1 import worker_pb2

from router.ledger import InstanceKey
from tests.unit.router.fakes import FakeDecode
from tests.unit.router.system import System, collect, running, text_of, until
from tests.unit.router.test_moves import ANSWER, PROMPT, drain, stepping

BLOCK = 16


async def status(system: System) -> Any:
    return await system.membership.GetStatus(worker_pb2.GetStatusRequest())


@asynccontextmanager
async def overcommitted(
    expected_output_tokens: int = 8, **settings: Any
) -> AsyncIterator[tuple[System, FakeDecode]]:
    async with running(**settings) as system:
        await system.add_prefill()
        decode = await system.add_decode("a", expected_output_tokens=expected_output_tokens)
        yield system, decode


def blocks(output_tokens: int) -> int:
    return -(-(len(PROMPT) + output_tokens) // BLOCK)


def booked(system: System, decode: FakeDecode) -> int:
    return system.group.ledger.reserved_blocks(InstanceKey(decode.name, decode.epoch))


async def test_sequence_that_was_carried_over_is_booked_as_it_grows() -> None:
    async with overcommitted() as (system, first):
        first.pause_after = 5
        call = await stepping(system, first, 300)
        second = await system.add_decode("b", expected_output_tokens=8)
        second.silent_after = 200
        await drain(system, first)
        await until(lambda: booked(system, second) == blocks(200))
        assert booked(system, first) == 0
        second.silent_after = None
        system.group.ledger.check_integrity()
        call.cancel()
        await system.settled()
        assert booked(system, second) == 0


async def test_status_tells_how_many_outgrew_and_the_risk() -> None:
    async with overcommitted() as (system, decode):
        await collect(system.generate(max_new_tokens=4))
        counts = (await status(system)).requests
        assert (counts.overcommitted, counts.outgrown) == (0, 0)
        decode.silent_after = 100
        calls = [system.generate(max_new_tokens=900) for _ in range(2)]
        for call in calls:
            await call.read()
        await until(lambda: system.group.metrics.admission.outgrown_count == 2)
        found = await status(system)
        assert (found.requests.overcommitted, found.requests.outgrown) == (2, 2)
        # Two times 900 tokens are more than there is, and nothing says that they will be fewer.
        risks = {instance.name: instance.overcommit_risk for instance in found.instances}
        assert risks == {"prefill": 0.0, "a": 1.0}
        name = "twinpool_router_overcommit_risk"
        assert system.sample(name) == 1.0
        for call in calls:
            call.cancel()
        await system.settled()
        assert system.sample(name) == 0.0


async def test_answers_teach_how_much_to_book() -> None:
    async with overcommitted(reserve="expected") as (system, decode):
        fields: dict[str, Any] = {"max_new_tokens": 400, "stop": ["d"]}
        for _ in range(20):
            assert text_of(await collect(system.generate(**fields))) == ANSWER[:-1]
        await system.settled()
        assert system.group.metrics.admission.overcommitted_count == 0
        decode.step_gate.clear()
        short = system.generate(**fields)
        await short.read()
        assert booked(system, decode) == blocks(len(ANSWER))
        # Nothing ends this one early.
        long = system.generate(max_new_tokens=400, ignore_eos=True)
        await long.read()
        assert booked(system, decode) == blocks(len(ANSWER)) + blocks(400)
        for call in (short, long):
            call.cancel()
        await system.settled()


async def test_whole_reservations_are_told_of_where_expected_ones_are_wanted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with overcommitted(reserve="expected") as (system, _):
        assert "--kv-overcommit" not in caplog.text
        await system.add_decode("whole")
        assert "whole reserves room for all of max_new_tokens" in caplog.text
    async with running() as system:
        caplog.clear()
        await system.add_decode("whole")
        assert "--kv-overcommit" not in caplog.text
