"""Reservations hold what they promise, and give it back whatever happens."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from decode.admission import Admission
from decode.prefixes import Prefixes
from decode.refusals import NoRoom, StillOpen
from decode.sequence import Reservation, State
from engine.blocks import BlockPool
from engine.sampling import SamplingParams
from engine.stopping import StopCriteria

BLOCKS = 12
BLOCK_SIZE = 4


def reservation(request_id: int, tokens: int = 6, router_id: str = "r") -> Reservation:
    return Reservation(
        request_id=request_id,
        router_id=router_id,
        prompt_tokens=tokens,
        prompt_ids=(),
        sampling=SamplingParams(),
        stop=StopCriteria(max_new_tokens=2),
        ttl_s=10.0,
    )


def make(**changes: Any) -> tuple[Admission, list[int]]:
    revoked: list[int] = []
    arguments = {
        "prefixes": [Prefixes(BlockPool(BLOCKS), layers=2)],
        "block_size": BLOCK_SIZE,
        "max_sequences": 4,
        "revoke": revoked.append,
        **changes,
    }
    return Admission(**arguments), revoked


def test_sequence_runs_only_when_its_kv_and_its_first_token_are_there() -> None:
    admission, _ = make()
    one = admission.reserve(reservation(1))
    assert not admission.activate(1, 9)
    assert admission.complete(one.transfer.transfer_id) is one
    two = admission.reserve(reservation(2))
    assert admission.complete(two.transfer.transfer_id) is None
    assert admission.activate(2, 9)
    assert one.state is two.state is State.RUNNING


def test_dp_ranks_have_blocks_of_their_own() -> None:
    stores = [Prefixes(BlockPool(2), layers=2, dp_rank=rank) for rank in range(2)]
    admission, _ = make(prefixes=stores)
    first = admission.reserve(reservation(1))
    with pytest.raises(NoRoom):
        admission.reserve(reservation(2))
    second = admission.reserve(replace(reservation(2), dp_rank=1))
    assert (first.blocks, second.blocks) == ([0, 1], [0, 1])
    assert (admission.counts().total, admission.counts().reserved) == (4, 4)
    admission.check_integrity()
    admission.end(1)
    assert [store.pool.counts().reserved for store in stores] == [0, 2]


def test_second_activation_changes_nothing() -> None:
    admission, _ = make()
    record = admission.reserve(reservation(1))
    admission.complete(record.transfer.transfer_id)
    assert admission.activate(1, 9)
    assert not admission.activate(1, 8)
    assert record.last_token_id == 9


def test_blocks_of_an_aborted_transfer_stay_in_quarantine_until_its_writer_is_gone() -> None:
    admission, revoked = make()
    record = admission.reserve(reservation(1))
    admission.end(1)
    assert revoked == [record.transfer.transfer_id]
    assert admission.counts().quarantined == len(record.blocks)
    assert admission.writer_closed(record.transfer.transfer_id) is None
    assert admission.counts().free == BLOCKS


KEPT = ((3, 1),)


def test_failed_transfer_leaves_its_sequence_waiting_for_another_one() -> None:
    admission, revoked = make()
    record = admission.reserve(reservation(1))
    lost = record.transfer
    admission.activate(1, 9)
    assert not lost.over.done()
    assert admission.writer_closed(lost.transfer_id, KEPT) is record
    assert lost.over.done()
    assert admission.complete(lost.transfer_id) is None
    assert admission.counts().reserved == len(record.blocks)
    assert admission.regrant(1) is record
    assert record.transfer.kept == KEPT
    assert record.transfer.transfer_id != lost.transfer_id
    assert record.transfer.nonce != lost.nonce
    # What is still said of the old one does not count for the new one.
    assert admission.writer_closed(lost.transfer_id) is None
    assert admission.complete(lost.transfer_id) is None
    assert admission.complete(record.transfer.transfer_id) is record
    assert record.state is State.RUNNING
    assert revoked == []


def test_only_a_lost_transfer_is_replaced() -> None:
    admission, _ = make()
    record = admission.reserve(reservation(1))
    with pytest.raises(StillOpen) as open_:
        admission.regrant(1)
    assert open_.value.transfer is record.transfer
    admission.complete(record.transfer.transfer_id)
    assert admission.regrant(1) is None
    admission.end(1)
    with pytest.raises(KeyError):
        admission.regrant(1)


def test_blocks_of_a_resumed_sequence_wait_for_the_writer_of_now() -> None:
    admission, revoked = make()
    record = admission.reserve(reservation(1))
    admission.writer_closed(record.transfer.transfer_id)
    admission.regrant(1)
    admission.end(1)
    assert revoked == [record.transfer.transfer_id]
    assert admission.counts().quarantined == len(record.blocks)
    admission.writer_closed(record.transfer.transfer_id)
    assert admission.counts().free == BLOCKS


def test_sequence_that_waits_for_another_transfer_ends_without_one() -> None:
    admission, revoked = make()
    record = admission.reserve(reservation(1))
    admission.writer_closed(record.transfer.transfer_id)
    admission.end(1)
    assert revoked == []
    assert admission.counts().free == BLOCKS


def test_running_sequence_is_left_to_the_step_loop() -> None:
    admission, _ = make()
    record = admission.reserve(reservation(1))
    admission.complete(record.transfer.transfer_id)
    admission.activate(1, 9)
    assert not admission.end_unless_running(1)
    assert admission.counts().used == len(record.blocks)
    admission.end(1)
    assert admission.counts().free == BLOCKS


def test_refusals_name_what_is_needed_and_free() -> None:
    admission, _ = make()
    with pytest.raises(NoRoom) as refused:
        admission.reserve(reservation(1, tokens=100))
    assert (refused.value.reason, refused.value.needed, refused.value.free) == (
        "KV_BLOCKS_FULL",
        26,
        BLOCKS,
    )
    for request_id in range(4):
        admission.reserve(reservation(request_id))
    with pytest.raises(NoRoom, match="SEQUENCES_FULL"):
        admission.reserve(reservation(9))


def test_same_request_twice_is_refused() -> None:
    admission, _ = make()
    admission.reserve(reservation(1))
    with pytest.raises(ValueError, match="already reserved"):
        admission.reserve(reservation(1))


def test_deadlines_pass_by_the_clock_that_is_given() -> None:
    now = [100.0]
    admission, _ = make(clock=lambda: now[0])
    record = admission.reserve(reservation(1))
    assert admission.expired() == []
    now[0] = 110.0
    assert admission.expired() == [record]


class AnyOrder(RuleBasedStateMachine):
    """Events in any order, for requests that may be long gone."""

    def __init__(self) -> None:
        super().__init__()
        self.admission, _ = make(max_sequences=6)
        self.transfers: list[int] = []

    @rule(request_id=st.integers(0, 8), tokens=st.integers(1, 20))
    def reserve(self, request_id: int, tokens: int) -> None:
        try:
            record = self.admission.reserve(reservation(request_id, tokens))
        except (NoRoom, ValueError):
            return
        self.transfers.append(record.transfer.transfer_id)

    @rule(request_id=st.integers(0, 8))
    def activate(self, request_id: int) -> None:
        self.admission.activate(request_id, 1)

    @rule(request_id=st.integers(0, 8))
    def regrant(self, request_id: int) -> None:
        try:
            record = self.admission.regrant(request_id)
        except (KeyError, StillOpen):
            return
        if record is not None:
            self.transfers.append(record.transfer.transfer_id)

    @rule(index=st.integers(0, 40), whole=st.booleans())
    def transfer_ends(self, index: int, whole: bool) -> None:
        if self.transfers:
            transfer_id = self.transfers[index % len(self.transfers)]
            if whole:
                self.admission.complete(transfer_id)
            else:
                self.admission.writer_closed(transfer_id)

    @rule(request_id=st.integers(0, 8))
    def end(self, request_id: int) -> None:
        self.admission.end(request_id)

    @invariant()
    def books_agree(self) -> None:
        self.admission.check_integrity()
        assert len(self.transfers) == len(set(self.transfers))

    def teardown(self) -> None:
        for request_id in range(9):
            self.admission.end(request_id)
        for transfer_id in self.transfers:
            self.admission.writer_closed(transfer_id)
        assert self.admission.counts().free == BLOCKS


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
