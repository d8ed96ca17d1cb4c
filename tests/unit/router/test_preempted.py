"""Decode hands a request back since earlier ones need its room: it goes on when there is some."""

import asyncio
from typing import Any

import pytest
from twinpool.v1 import worker_pb2

from router import reserving
from service.errors import Refused, Unavailable
from tests.unit.router.system import collect, error_of, pair, text_of, until
from tests.unit.router.test_moves import ANSWER, handed_back, moved, read_tokens


def preempted() -> worker_pb2.SequenceFailure:
    return handed_back("PREEMPTED")


async def test_it_goes_on_at_the_same_instance_as_often_as_it_takes() -> None:
    async with pair(max_retries=1) as (system, prefill, decode):
        decode.fail_after = (1, preempted())  # no token is ever from decode
        call = system.generate(max_new_tokens=11)
        began = await read_tokens(call, 5)
        decode.fail_after = None
        messages = [*began, *await collect(call)]
        assert text_of(messages) == ANSWER
        stats = messages[-1].stats
        assert stats.moves >= 4
        assert (stats.retries, moved(system, "preempted")) == (0, stats.moves)
        assert [start.output_tokens for start in prefill.starts] == list(range(stats.moves + 1))
        [came_us] = {reserve.came_us for reserve in decode.reserves.values()}
        assert came_us > 0
        await system.settled()


async def test_later_requests_came_later() -> None:
    async with pair() as (system, _, decode):
        for _ in range(2):
            await collect(system.generate(max_new_tokens=4))
        first, second = (reserve.came_us for reserve in decode.reserves.values())
        assert first < second


async def test_it_starts_over_where_there_was_no_token_yet() -> None:
    async with pair(max_retries=1) as (system, prefill, decode):
        prefill.compute_gate.clear()
        call = system.generate(max_new_tokens=11)
        for tries in range(1, 4):
            await until(lambda tries=tries: len(decode.reserves) == tries and bool(decode.held))  # type: ignore[misc]
            [(request_id, router_id)] = decode.held.items()
            failure = preempted()
            failure.request_id = request_id
            decode._say(router_id, worker_pb2.DecodeRunResponse(failures=[failure]))
            await until(lambda request_id=request_id: request_id in decode.aborted)  # type: ignore[misc]
        prefill.compute_gate.set()
        messages = await collect(call)
        assert text_of(messages) == ANSWER
        assert messages[-1].stats.moves == 0
        await system.settled()


async def test_its_instance_is_not_suspected() -> None:
    async with pair() as (system, _, decode):
        suspected: list[Any] = []
        system.group.pools.suspect = suspected.append  # type: ignore[method-assign,assignment]
        decode.fail_after = (3, preempted())
        call = system.generate(max_new_tokens=11)
        await read_tokens(call, 3)
        decode.fail_after = None
        assert (await collect(call))[-1].HasField("usage")
        assert suspected == []


async def test_it_waits_for_room_to_its_deadline() -> None:
    async with pair(max_queue_wait_s=0.1) as (system, _, decode):
        ledger, key = system.group.ledger, (decode.name, decode.epoch)
        decode.fail_after = (3, preempted())
        decode.step_gate.clear()
        call = system.generate(max_new_tokens=11)
        began = await read_tokens(call, 1)
        ledger.set_suspended(key, True)  # type: ignore[arg-type]
        decode.step_gate.set()
        began += await read_tokens(call, 2)
        await until(lambda: system.group.admission.queued == 1)
        decode.fail_after = None
        await asyncio.sleep(0.3)
        ledger.set_suspended(key, False)  # type: ignore[arg-type]
        system.group.admission.instances_changed()
        assert text_of([*began, *await collect(call)]) == ANSWER
        await system.settled()


@pytest.mark.parametrize("expected", [0, 4])
async def test_room_that_others_have_grown_into_is_waited_for(
    expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reserving, "RESERVE_PATIENCE_S", 0.0)
    async with pair(max_retries=1) as (system, _, decode):
        await decode.die()
        decode = await system.add_decode("tight", expected_output_tokens=expected)
        full = Refused("KV_BLOCKS_FULL", needed=2, free=1, retry_after_s=0.05)
        decode.reserve_errors = [full] * 4
        call = system.generate(max_new_tokens=11)
        if expected:
            assert text_of(await collect(call)) == ANSWER
            assert len(decode.reserves) == 5
        else:  # what has been booked in full is there, or something is wrong
            assert isinstance(await error_of(call), Unavailable)
        await system.settled()


async def test_room_is_booked_as_the_answer_grows() -> None:
    async with pair() as (system, _, decode):
        await decode.die()
        decode = await system.add_decode("tight", expected_output_tokens=4, silent_after=40)
        key: Any = (decode.name, decode.epoch)
        decode.step_gate.clear()
        call = system.generate(max_new_tokens=60)
        await read_tokens(call, 1)
        assert system.group.ledger.reserved_blocks(key) == 1
        decode.step_gate.set()
        await read_tokens(call, 39)
        assert system.group.ledger.reserved_blocks(key) == 4  # 9 tokens, and 40
        call.cancel()
        await system.settled()
        assert system.group.ledger.reserved_blocks(key) == 0
