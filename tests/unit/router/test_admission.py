"""Who gets room when somebody stops waiting for it."""

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry

from router.admission import Admission
from router.fairness import Tenants
from router.gate import Gate
from router.ledger import Capacity, InstanceKey, Ledger, Need
from router.metrics.admission import AdmissionMetrics
from router.policies.least_loaded import LeastLoaded
from router.queue import Waiting
from service.errors import Refused

CAPACITY = Capacity(blocks=10, block_size=16, max_sequences=8, max_sequence_tokens=1000)


def admission(*, max_requests: int = 8) -> Admission:
    """Room for ten blocks; whoever was overtaken once holds back all that come later."""
    ledger = Ledger(max_prefill_requests=8)
    ledger.add_prefill(InstanceKey("p", 1), CAPACITY)
    ledger.add_decode(InstanceKey("d", 1), CAPACITY)
    gate = Gate(
        ledger=ledger,
        policy=LeastLoaded(),
        tenants=Tenants(),
        max_queue=max_requests,
        max_bypasses=1,
        grace_s=1.0,
        refuses_early=False,
    )
    made = Admission(gate=gate, metrics=AdmissionMetrics(CollectorRegistry()), clock=time.monotonic)
    made.instances_changed()
    return made


def asks(room: Admission, request_id: int, blocks: int) -> "asyncio.Task[object]":
    need = Need(prompt_tokens=16 * blocks - 2, max_new_tokens=2)
    start_by = time.monotonic() + 60.0
    waiting = Waiting(request_id=request_id, need=need, priority=0, start_by=start_by)
    return asyncio.create_task(room.admit(waiting, time.monotonic()))


async def passed(*tasks: "asyncio.Task[object]") -> list[bool]:
    """Which of them have what they waited for, once all have run as far as they can."""
    for _ in range(5):
        await asyncio.sleep(0)
    return [task.done() for task in tasks]


async def test_those_held_back_go_on_when_the_one_before_them_is_cancelled() -> None:
    room = admission()
    running, large, small, held = (asks(room, n, b) for n, b in enumerate((6, 8, 1, 1), start=1))
    assert await passed(running, large, small, held) == [True, False, True, False]
    large.cancel()
    assert await passed(held) == [True]
    room.close()


async def test_room_that_is_given_back_goes_to_the_next() -> None:
    room = admission()
    running, large = asks(room, 1, 6), asks(room, 2, 8)
    assert await passed(running, large) == [True, False]
    room.release(1)
    assert await passed(large) == [True]
    room.close()


async def test_a_request_that_finds_the_queue_full_is_refused_and_nobody_else() -> None:
    room = admission(max_requests=1)
    running, large, late = asks(room, 1, 6), asks(room, 2, 8), asks(room, 3, 8)
    assert await passed(running, large, late) == [True, False, True]
    with pytest.raises(Refused) as refused:
        await late
    assert refused.value.reason == "QUEUE_FULL"
    room.release(3)
    assert await passed(large) == [False]
    room.release(1)
    assert await passed(large) == [True]
    room.close()
