"""Sequences that outgrow what was reserved for them: who gets the next block, and who goes."""

import threading
from typing import Any

import pytest

from decode.admission import Admission
from decode.prefixes import Prefixes
from decode.refusals import NoRoom
from decode.scheduler import Scheduler
from decode.sequence import Reservation, SequenceRecord, State
from decode.worker import Worker
from engine.blocks import BlockPool
from engine.sampling import SamplingParams
from engine.stopping import StopCriteria
from tests.unit.decode.test_worker import WAIT_S, Controlled

BLOCK_SIZE = 4
BLOCKS = 4


def reservation(request_id: int, tokens: int = 4, new: int = 12, **more: Any) -> Reservation:
    return Reservation(
        request_id=request_id,
        router_id="r",
        prompt_tokens=tokens,
        prompt_ids=(),
        sampling=SamplingParams(),
        stop=StopCriteria(max_new_tokens=new),
        ttl_s=10.0,
        **more,
    )


def make(expected: int | None = 2, **changes: Any) -> tuple[Admission, list[int]]:
    revoked: list[int] = []
    arguments = {
        "prefixes": [Prefixes(BlockPool(BLOCKS), layers=2)],
        "block_size": BLOCK_SIZE,
        "max_sequences": 4,
        "expected_output_tokens": expected,
        "revoke": revoked.append,
        **changes,
    }
    return Admission(**arguments), revoked


def run(admission: Admission, request_id: int, **more: Any) -> SequenceRecord:
    """A running sequence of 5 tokens, which has 8 cells."""
    record = admission.reserve(reservation(request_id, **more))
    admission.complete(record.transfer.transfer_id)
    admission.activate(request_id, 1)
    return record


def fill(record: SequenceRecord) -> None:
    while record.sampling.position <= len(record.blocks) * BLOCK_SIZE:
        record.append(1)


def test_only_what_is_expected_is_reserved() -> None:
    admission, _ = make(expected=2)
    assert len(admission.reserve(reservation(1, tokens=4)).blocks) == 2
    assert len(admission.reserve(reservation(2, tokens=2, new=1)).blocks) == 1
    admission, _ = make(expected=None)
    assert len(admission.reserve(reservation(1, tokens=4)).blocks) == 4


def test_what_a_moved_request_has_counts_as_prompt() -> None:
    admission, _ = make(expected=2)
    moved = reservation(1, tokens=8, new=12, output_ids=(7,) * 6)
    assert len(admission.reserve(moved).blocks) == 3  # 8, and 2 more of those that are left
    admission, _ = make(expected=9)
    assert len(admission.reserve(moved).blocks) == 4  # 2 of its own, and 12


def test_sequence_that_could_never_be_whole_is_refused() -> None:
    admission, _ = make()
    with pytest.raises(NoRoom) as refused:
        admission.reserve(reservation(1, tokens=5))
    assert (refused.value.needed, refused.value.free) == (5, BLOCKS)


def test_block_is_taken_when_the_next_token_has_no_cell() -> None:
    admission, _ = make()
    record = run(admission, 1)
    assert admission.grow([1]).grown == []
    fill(record)
    growth = admission.grow([1])
    assert growth.grown == [(record, 2)]
    assert (record.blocks, growth.lacking, growth.handed_back) == ([0, 1, 2], frozenset(), [])
    assert admission.counts().used == 3
    admission.check_integrity()
    admission.end(1)
    assert admission.counts().free == BLOCKS


def test_latest_is_handed_back_for_the_earliest() -> None:
    admission, _ = make()
    first = run(admission, 1, came_us=5)
    latest = run(admission, 2, came_us=6)
    fill(first)
    growth = admission.grow([1, 2])
    assert growth.lacking == {1, 2}
    assert growth.handed_back == [latest]
    # Nobody else goes while its blocks are about to come back.
    assert admission.grow([1, 2]).handed_back == []
    admission.end(2)
    assert [record for record, _ in admission.grow([1]).grown] == [first]
    admission.check_integrity()


def test_earlier_request_that_came_back_is_not_the_latest() -> None:
    admission, _ = make()
    latest = run(admission, 1, came_us=6)
    run(admission, 2, came_us=5)
    fill(latest)
    assert admission.grow([1, 2]).handed_back == [latest]


def test_blocks_of_a_reserved_sequence_come_when_its_writer_is_gone() -> None:
    admission, revoked = make()
    first = run(admission, 1)
    reserved = admission.reserve(reservation(2))
    fill(first)
    assert admission.grow([1]).handed_back == [reserved]
    assert not admission.activate(2, 1)
    admission.end_unless_running(2)
    assert revoked == [reserved.transfer.transfer_id]
    growth = admission.grow([1])
    assert growth.lacking == {1}
    assert not growth.grown
    assert not growth.handed_back
    admission.writer_closed(reserved.transfer.transfer_id)
    assert [record for record, _ in admission.grow([1]).grown] == [first]


def test_sequence_that_is_handed_back_does_not_start() -> None:
    admission, _ = make()
    first = run(admission, 1)
    reserved = admission.reserve(reservation(2))
    admission.activate(2, 1)
    fill(first)
    admission.grow([1])
    assert admission.complete(reserved.transfer.transfer_id) is None
    assert reserved.state is State.RESERVED


def test_room_that_comes_back_is_for_those_who_wait() -> None:
    told: list[bool] = []
    admission, _ = make(on_room=lambda: told.append(True))
    first = run(admission, 1)
    run(admission, 2)
    fill(first)
    admission.grow([1, 2])
    assert not told
    admission.end(2)
    assert told
    with pytest.raises(NoRoom, match="KV_BLOCKS_FULL"):
        admission.reserve(reservation(3, tokens=1, new=2))
    admission.grow([1])
    admission.reserve(reservation(3, tokens=1, new=2))


def test_end_of_the_last_writer_is_told_too() -> None:
    told: list[bool] = []
    admission, _ = make(on_room=lambda: told.append(True))
    first = run(admission, 1)
    reserved = admission.reserve(reservation(2))
    fill(first)
    admission.grow([1])
    admission.end_unless_running(2)
    told.clear()
    admission.writer_closed(reserved.transfer.transfer_id)
    assert told


def test_last_block_is_the_earliest_ones() -> None:
    admission, _ = make()
    latest = run(admission, 1, came_us=2, tokens=2)
    first = run(admission, 2, came_us=1)
    fill(latest)
    fill(first)
    growth = admission.grow([1, 2])
    assert [record for record, _ in growth.grown] == [first]
    assert growth.handed_back == [latest]


def test_dp_ranks_hand_back_their_own() -> None:
    stores = [Prefixes(BlockPool(BLOCKS), layers=2, dp_rank=rank) for rank in range(2)]
    admission, _ = make(prefixes=stores)
    first, latest = run(admission, 1), run(admission, 2)
    run(admission, 3, dp_rank=1)
    fill(first)
    assert admission.grow([1, 2, 3]).handed_back == [latest]
    admission.reserve(reservation(4, dp_rank=1))


class Loop:
    """A worker's thread, with what it hands back ended as the service does it: later."""

    def __init__(self) -> None:
        self.compute = Controlled(1)
        self.handed_back: list[SequenceRecord] = []
        self._changed = threading.Condition()
        self.admission, _ = make(
            on_room=lambda: self.worker.room(),
            on_end=lambda record: self.compute.remove(record.request_id),
        )
        self.worker: Worker = Worker(
            compute=self.compute,
            admission=self.admission,
            scheduler=Scheduler(max_batch=8),
            emit=lambda _: None,
            hand_back=self._hand_back,
            on_fatal=lambda _: None,
        )

    def _hand_back(self, record: SequenceRecord) -> None:
        with self._changed:
            self.handed_back.append(record)
            self._changed.notify_all()

    def wait_handed_back(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: bool(self.handed_back), WAIT_S)


def test_running_sequence_goes_at_once_and_the_other_steps_on() -> None:
    loop = Loop()
    run(loop.admission, 1)
    run(loop.admission, 2)
    loop.worker.ready(1)
    loop.worker.ready(2)
    loop.worker.start()
    for _ in range(4):
        loop.compute.end_step()
    loop.compute.wait_begun(5)
    loop.worker.stop()
    assert [[row.request_id for row in of] for of in loop.compute.begun[3]] == [[1, 2]]
    assert [[row.request_id for row in of] for of in loop.compute.begun[4]] == [[1]]
    assert [record.request_id for record in loop.handed_back] == [2]
    assert loop.compute.removed == [2]


def test_sequence_steps_when_the_last_writer_into_its_block_is_gone() -> None:
    loop = Loop()
    run(loop.admission, 1)
    reserved = loop.admission.reserve(reservation(2))
    loop.worker.ready(1)
    loop.worker.start()
    for _ in range(4):
        loop.compute.end_step()
    loop.wait_handed_back()
    assert len(loop.compute.begun) == 4
    loop.admission.end_unless_running(2)
    loop.admission.writer_closed(reserved.transfer.transfer_id)
    loop.compute.wait_begun(5)
    loop.worker.stop()
    assert loop.compute.begun[4][0][0].start == 8


def test_steps_go_on_without_a_sequence_that_waits() -> None:
    scheduler = Scheduler(max_batch=4)
    for request_id in (1, 2, 3):
        scheduler.add(request_id)
    scheduler.finished(scheduler.schedule())
    assert scheduler.idle == [1, 2, 3]
    step = scheduler.schedule(without=(1,))
    assert step == ((2, 3),)
    assert scheduler.idle == [1]
    scheduler.finished(step)
    assert scheduler.schedule() == ((1, 2, 3),)
