"""The ledger and the queue: accounts that always balance, an order that starves nobody."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.ring.cyclic import Dealing
from router.ledger import Capacity, InstanceKey, Ledger, LedgerError, Need, Placement
from router.policies.least_loaded import LeastLoaded
from router.queue import AdmissionQueue, QueueFull, Waiting
from router.room import Misfits, Room
from router.views import AskEach, Pace
from service.step_fit import StepSpeed

PREFILL = InstanceKey("prefill", 1)
DECODE = InstanceKey("decode", 1)


def capacity(blocks: int = 8, *, sequences: int = 4, tokens: int = 1 << 20) -> Capacity:
    return Capacity(
        blocks=blocks, block_size=16, max_sequences=sequences, max_sequence_tokens=tokens
    )


def ledger(blocks: int = 8, **options: int) -> Ledger:
    made = Ledger(max_prefill_requests=64)
    made.add_prefill(PREFILL, capacity(1000))
    made.add_decode(DECODE, capacity(blocks, **options))
    return made


def need(prompt: int = 16, new: int = 16) -> Need:
    return Need(prompt_tokens=prompt, max_new_tokens=new)


@given(
    ranks=st.integers(1, 5),
    grain=st.sampled_from([1, 3, 16]),
    tokens=st.integers(0, 200),
    first=st.integers(0, 4),
)
def test_shares_of_ranks_are_those_that_prefill_deals(
    ranks: int, grain: int, tokens: int, first: int
) -> None:
    first %= ranks
    wide = replace(capacity(), block_size=ranks * grain, cp=ranks)
    dealt = Dealing(ranks, grain).shards(0, tokens, first).new
    assert wide.shares(tokens, first) == [sum(map(len, pieces)) for pieces in dealt]


PLACE = Placement(prefill=PREFILL, decode=DECODE)


def test_need_is_rounded_up_to_blocks_and_given_back_whole() -> None:
    book = ledger(blocks=8)
    assert book.try_reserve(1, need(17, 16), PLACE)
    assert book.reserved_blocks(DECODE) == 3
    book.release(1)
    book.release(1)
    assert book.reserved_blocks(DECODE) == 0
    assert book.is_idle()


def test_suspended_instance_keeps_what_it_has_and_gets_nothing_new() -> None:
    book = ledger()
    assert book.try_reserve(1, need(), PLACE)
    for key in (PREFILL, DECODE):
        book.set_suspended(key, True)
        assert not book.try_reserve(2, need(), PLACE)
        assert book.fits_ever(need())
        book.check_integrity()
        book.set_suspended(key, False)
    assert book.try_reserve(2, need(), PLACE)
    book.release(1)
    book.release(2)
    assert book.is_idle()


def test_one_that_is_tried_gets_one_request_and_is_suspended_again() -> None:
    for key in (PREFILL, DECODE):
        book = ledger()
        book.set_suspended(key, False, after_one=True)
        assert book.prefills()
        assert book.decodes()
        assert book.try_reserve(1, need(), PLACE)
        book.check_integrity()
        assert not (book.prefills() if key == PREFILL else book.decodes())
        assert not book.try_reserve(2, need(), PLACE)
        book.release(1)
        assert not book.try_reserve(2, need(), PLACE)
        book.set_suspended(key, False)
        assert book.try_reserve(2, need(), PLACE)
        assert book.try_reserve(3, need(), PLACE)
        book.check_integrity()


def test_views_show_the_latest_pace() -> None:
    book = ledger()
    for step_s in (0.01, 0.02):
        pace = Pace(speed=StepSpeed(base_s=step_s, sequence_s=0.0, token_s=1e-3))
        for key in (PREFILL, DECODE, InstanceKey("nobody", 1)):
            book.set_pace(key, pace)
        assert (book.prefills()[0].pace, book.decodes()[0].pace) == (pace, pace)
    book.check_integrity()


def test_nothing_is_booked_where_a_part_does_not_fit() -> None:
    book = ledger(blocks=4, sequences=2)
    assert not book.try_reserve(1, need(64, 16), PLACE)
    assert book.is_idle()
    assert book.try_reserve(1, need(), PLACE)
    assert book.try_reserve(2, need(), PLACE)
    assert not book.try_reserve(3, need(1, 1), PLACE)
    assert book.prefills()[0].outstanding_tokens == 32
    book.check_integrity()


def test_sequence_longer_than_the_instance_takes_never_fits() -> None:
    book = ledger(blocks=8, tokens=40)
    assert not book.fits_ever(need(32, 16))
    assert book.fits_ever(need(24, 16))
    assert book.largest_request_tokens() == 40
    assert not book.try_reserve(1, need(32, 16), PLACE)


def test_one_token_needs_no_room_at_decode() -> None:
    book = Ledger(max_prefill_requests=4)
    book.add_prefill(PREFILL, capacity(2))
    assert book.fits_ever(need(32, 1))
    assert not book.fits_ever(need(33, 1))
    assert not book.fits_ever(need(32, 2))


def test_instance_that_goes_takes_its_reservations_along() -> None:
    book = ledger()
    assert book.try_reserve(1, need(), PLACE)
    book.remove(DECODE)
    book.add_decode(InstanceKey("decode", 2), capacity())
    book.release(1)
    book.check_integrity()
    assert book.is_idle()
    assert book.decodes()[0].free_blocks == 8


def test_draining_instance_keeps_what_it_has_and_gets_nothing() -> None:
    book = ledger()
    assert book.try_reserve(1, need(), PLACE)
    book.set_draining(DECODE)
    assert not book.try_reserve(2, need(), PLACE)
    assert book.decodes() == []
    assert book.reserved_blocks(DECODE) == 2
    book.release(1)
    assert book.reserved_blocks(DECODE) == 0


def test_prefill_does_not_owe_what_it_is_thought_to_have() -> None:
    book = ledger()
    place = replace(PLACE, cached_tokens=16)
    assert book.try_reserve(1, need(20, 4), place)
    assert [p.outstanding_tokens for p in book.prefills()] == [4]
    book.check_integrity()
    book.release(1)
    assert [p.outstanding_tokens for p in book.prefills()] == [0]


def test_request_is_booked_once_and_instance_added_once() -> None:
    book = ledger()
    assert book.try_reserve(1, need(), PLACE)
    with pytest.raises(LedgerError, match="has a reservation"):
        book.try_reserve(1, need(), PLACE)
    with pytest.raises(LedgerError, match="decode epoch 1"):
        book.add_decode(DECODE, capacity())


def test_credit_bounds_what_is_promised_but_not_what_fits_ever() -> None:
    book = ledger(blocks=8)
    book.set_credit(DECODE, [3], 4)
    assert book.decodes()[0].free_blocks == 3
    assert not book.try_reserve(1, need(32, 32), PLACE)
    assert book.fits_ever(need(64, 64))
    assert book.try_reserve(1, need(16, 16), PLACE)
    assert not book.try_reserve(2, need(16, 16), PLACE)
    book.check_integrity()
    book.set_credit(DECODE, [8], 1)
    assert not book.try_reserve(2, need(16, 16), PLACE)
    assert not book.decodes()[0].fits(need(16, 16))
    assert book.held(DECODE) == ([2], 1)
    book.set_credit(InstanceKey("other", 1), [8], 1)
    with pytest.raises(LedgerError, match="dp ranks"):
        book.set_credit(DECODE, [4, 4], 1)


class LedgerAndQueue(RuleBasedStateMachine):
    """Requests come, wait, run, end and are aborted while instances come and go."""

    @initialize(max_bypasses=st.integers(1, 3))
    def begin(self, max_bypasses: int) -> None:
        self.ledger = Ledger(max_prefill_requests=6)
        self.queue = AdmissionQueue(max_requests=5, max_bypasses=max_bypasses)
        self.max_bypasses = max_bypasses
        self.epoch = 0
        self.instances: set[InstanceKey] = set()
        self.next_id = 0
        self.waiting: dict[int, Waiting] = {}
        self.running: dict[int, Placement] = {}
        self.credits: dict[InstanceKey, int] = {}

    @rule(
        decode=st.booleans(),
        blocks=st.integers(1, 12),
        sequences=st.integers(1, 4),
        cp=st.sampled_from([1, 2, 4]),
    )
    def instance_comes(self, decode: bool, blocks: int, sequences: int, cp: int) -> None:
        self.epoch += 1
        key = InstanceKey("decode" if decode else "prefill", self.epoch)
        add = self.ledger.add_decode if decode else self.ledger.add_prefill
        made = capacity(blocks, sequences=sequences)
        add(key, made if decode else replace(made, cp=cp))
        self.instances.add(key)

    @rule(data=st.data())
    def credit_changes(self, data: st.DataObject) -> None:
        if decodes := self.ledger.decodes():
            view = data.draw(st.sampled_from(decodes))
            blocks = data.draw(st.integers(0, view.capacity.blocks))
            places = data.draw(st.integers(0, view.capacity.max_sequences))
            self.ledger.set_credit(view.key, [blocks], places)
            self.credits[view.key] = blocks

    @rule(data=st.data())
    def instance_goes(self, data: st.DataObject) -> None:
        if self.instances:
            key = data.draw(st.sampled_from(sorted(self.instances)))
            self.instances.discard(key)
            self.ledger.remove(key)

    @rule(data=st.data())
    def instance_drains(self, data: st.DataObject) -> None:
        if self.instances:
            self.ledger.set_draining(data.draw(st.sampled_from(sorted(self.instances))))

    @rule(
        prompt=st.integers(1, 120),
        new=st.integers(1, 60),
        priority=st.integers(-1, 1),
        start_by=st.integers(1, 50),
        # Also more than the prompt has.
        cached=st.integers(0, 80),
    )
    def request_comes(
        self, prompt: int, new: int, priority: int, start_by: int, cached: int
    ) -> None:
        self.next_id += 1
        waiting = Waiting(
            request_id=self.next_id,
            need=need(prompt, new),
            priority=priority,
            start_by=start_by,
            cached_tokens=AskEach(lambda key, _: cached * (key.epoch % 3)),
        )
        if len(self.waiting) == 5:
            with pytest.raises(QueueFull):
                self.queue.push(waiting)
        else:
            self.queue.push(waiting)
            self.waiting[self.next_id] = waiting

    @rule()
    def room_is_given(self) -> None:
        while True:
            before = {w.request_id: w.bypasses for w in self.waiting.values()}
            found = self.queue.next_admissible(Room(self.ledger, LeastLoaded(), Misfits()))
            if found is None:
                return
            admitted, placement = found
            assert self.ledger.try_reserve(admitted.request_id, admitted.need, placement)
            del self.waiting[admitted.request_id]
            self.running[admitted.request_id] = placement
            for waiting in self.waiting.values():
                passed = waiting.bypasses > before[waiting.request_id]
                if passed and self.ledger.fits_ever(waiting.need):
                    assert admitted.overdue or before[waiting.request_id] < max(
                        1, self.max_bypasses
                    )

    @rule(data=st.data())
    def request_ends(self, data: st.DataObject) -> None:
        if self.running:
            request_id = data.draw(st.sampled_from(sorted(self.running)))
            del self.running[request_id]
            self.ledger.release(request_id)
            self.ledger.release(request_id)

    @rule(data=st.data())
    def request_leaves_the_queue(self, data: st.DataObject) -> None:
        if self.waiting:
            waiting = self.waiting.pop(data.draw(st.sampled_from(sorted(self.waiting))))
            self.queue.discard(waiting)
            self.queue.discard(waiting)

    @rule(now=st.integers(0, 50))
    def time_passes(self, now: int) -> None:
        for expired in self.queue.take_expired(now):
            assert expired.start_by <= now
            del self.waiting[expired.request_id]
        assert all(w.start_by > now for w in self.waiting.values())

    @invariant()
    def accounts_balance(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.check_integrity()
            self.queue.check_integrity()
            assert len(self.queue) == len(self.waiting)

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            for request_id in self.running:
                self.ledger.release(request_id)
            assert self.ledger.is_idle()
            for view in self.ledger.decodes():
                assert view.free_blocks == self.credits.get(view.key, view.capacity.blocks)


TestLedgerAndQueue: Any = LedgerAndQueue.TestCase
TestLedgerAndQueue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def overcommitted(blocks: int = 8, expected: int = 8, dp: int = 1) -> Ledger:
    made = Ledger(max_prefill_requests=64)
    made.add_prefill(PREFILL, capacity(1000))
    made.add_decode(DECODE, replace(capacity(blocks), expected_output_tokens=expected, dp=dp))
    return made


def test_only_the_output_that_is_expected_is_booked() -> None:
    book = overcommitted(blocks=8, expected=8)
    assert book.try_reserve(1, need(24, 100), PLACE)
    assert book.try_reserve(2, need(24, 2), PLACE)
    assert book.reserved_blocks(DECODE) == 4
    assert not book.fits_ever(need(24, 105))
    assert not book.try_reserve(3, need(24, 105), PLACE)
    assert not book.decodes()[0].fits(need(24, 105))
    book.check_integrity()


def test_what_a_sequence_has_grown_to_is_booked_and_given_back() -> None:
    book = overcommitted(blocks=8, expected=8)
    assert book.try_reserve(1, need(24, 100), PLACE)
    book.grow(1, 32)
    assert (book.reserved_blocks(DECODE), book.decodes()[0].free_blocks) == (2, 6)
    book.grow(1, 33)
    assert book.reserved_blocks(DECODE) == 3
    # One more is left to it: it will need it soon.
    assert book.decodes()[0].free_blocks == 4
    assert not book.try_reserve(2, need(80, 100), PLACE)
    assert book.try_reserve(2, need(56, 40), PLACE)
    book.grow(2, 96)
    book.check_integrity()
    assert book.reserved_blocks(DECODE) == 9  # more than there is, if they share blocks
    book.grow(3, 1000)
    book.release(1)
    book.release(2)
    book.check_integrity()
    assert book.decodes()[0].free_blocks == 8


def test_nothing_grows_where_all_is_booked_at_first() -> None:
    book = ledger(blocks=8)
    assert book.try_reserve(1, need(16, 16), PLACE)
    book.grow(1, 33)
    assert book.reserved_blocks(DECODE) == 2
    book.check_integrity()


def test_growth_is_its_own_dp_ranks() -> None:
    book = overcommitted(blocks=8, dp=2)
    assert book.try_reserve(1, need(24, 30), replace(PLACE, dp_rank=1))
    book.grow(1, 40)
    assert [view.free_blocks for view in book.decodes()] == [4, 0]
    book.check_integrity()


def test_sequence_must_fit_one_dp_rank() -> None:
    book = Ledger(max_prefill_requests=9)
    book.add_prefill(PREFILL, capacity(1000))
    book.add_decode(DECODE, replace(capacity(8), dp=2))
    assert book.largest_request_tokens() == 4 * 16
    first, second = (replace(PLACE, dp_rank=dp_rank) for dp_rank in range(2))
    assert book.try_reserve(1, need(33, 15), first)  # three blocks
    assert book.try_reserve(2, need(33, 15), second)
    # Two blocks are left, but one on each.
    assert not book.try_reserve(3, need(17, 15), first)
    assert not book.try_reserve(3, need(17, 15), second)
    assert [(view.dp_rank, view.free_blocks) for view in book.decodes()] == [(0, 1), (1, 1)]
    book.release(2)
    assert [view.free_blocks for view in book.decodes()] == [4, 1]
    book.check_integrity()
