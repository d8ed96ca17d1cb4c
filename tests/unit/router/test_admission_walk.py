"""Requests of several tenants come, wait, run and end at random, on a virtual clock."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router.fairness import ANYONE, Tenants, Usage
from router.gate import Decision, Gate
from router.ledger import Capacity, InstanceKey, Ledger, Need, Placement
from router.output_lengths import OutputLengths
from router.policies.least_loaded import LeastLoaded
from router.queue import Waiting
from service.errors import ServiceError

MAX_QUEUE = 6
MAX_BYPASSES = 3
MAX_OPEN = {"small": 3}
NAMES = st.sampled_from(["", "small", "large"])


class AdmissionWalk(RuleBasedStateMachine):
    """A gate, and beside it the plainest account of what it should know."""

    @initialize(overcommits=st.booleans(), refuses_early=st.booleans(), learns=st.booleans())
    def begin(self, overcommits: bool, refuses_early: bool, learns: bool) -> None:
        self.overcommits = overcommits
        self.learns = learns
        # What decode has taken for each sequence, in tokens: it never asks the ledger.
        self.come_to: dict[int, int] = {}
        self.ledger = Ledger(max_prefill_requests=5)
        self.gate = Gate(
            ledger=self.ledger,
            policy=LeastLoaded(),
            tenants=Tenants(
                weights={"large": 3.0},
                max_requests=MAX_OPEN,
                max_queued={"large": 4},
                max_tokens={ANYONE: 400},
            ),
            max_queue=MAX_QUEUE,
            max_bypasses=MAX_BYPASSES,
            grace_s=2.0,
            refuses_early=refuses_early,
            lengths=OutputLengths(0.9 if learns else None),
        )
        self.now = 0.0
        self.epoch = 0
        self.next_id = 0
        self.instances: set[InstanceKey] = set()
        self.waiting: dict[int, Waiting] = {}
        self.running: dict[int, Waiting] = {}
        self.instance_comes(decode=True, blocks=12, sequences=4)
        self.instance_comes(decode=False, blocks=12, sequences=4)

    # ---- what happens

    @rule(decode=st.booleans(), blocks=st.integers(1, 12), sequences=st.integers(1, 4))
    def instance_comes(self, decode: bool, blocks: int, sequences: int) -> None:
        if len(self.instances) > 4:
            return
        self.epoch += 1
        key = InstanceKey("decode" if decode else "prefill", self.epoch)
        add = self.ledger.add_decode if decode else self.ledger.add_prefill
        capacity = Capacity(
            blocks=blocks, block_size=16, max_sequences=sequences, max_sequence_tokens=1 << 20
        )
        expected = 8 if decode and self.overcommits else 0
        add(key, replace(capacity, expected_output_tokens=expected))
        self.instances.add(key)
        self.instances_changed()

    @rule(data=st.data(), drains=st.booleans())
    def instance_goes(self, data: st.DataObject, drains: bool) -> None:
        if len(self.instances) > 2:
            key = data.draw(st.sampled_from(sorted(self.instances)))
            if drains:
                self.ledger.set_draining(key)
            else:
                self.instances.discard(key)
                self.ledger.remove(key)
            self.instances_changed()

    def instances_changed(self) -> None:
        self.gate.instances_changed(self.now)
        self.decide()

    @rule(
        tenant=NAMES,
        prompt=st.integers(1, 120),
        new=st.integers(1, 60),
        priority=st.integers(-1, 1),
        patience_s=st.integers(1, 50),
        generated=st.sampled_from([0, 0, 5, 40]),
        sure=st.sampled_from([0, 0, 3, 60]),
        again=st.sampled_from([False, False, False, True]),
        resumes=st.sampled_from([False, False, False, True]),
    )
    def request_comes(
        self,
        tenant: str,
        prompt: int,
        new: int,
        priority: int,
        patience_s: int,
        generated: int,
        sure: int,
        again: bool,
        resumes: bool,
    ) -> None:
        self.next_id += 1
        waiting = Waiting(
            request_id=self.next_id,
            need=Need(
                prompt_tokens=prompt,
                max_new_tokens=new,
                generated_tokens=min(generated, prompt - 1),
                sure_new_tokens=min(sure, new),
            ),
            priority=priority,
            tenant=tenant,
            start_by=self.now + patience_s,
            resumes=resumes,
            patient=resumes,
            again=again,
        )
        try:
            decisions = self.gate.offer(waiting, self.now)
        except ServiceError as error:
            self.check_refusal(waiting, error)
            return
        self.waiting[self.next_id] = waiting
        self.take(decisions)
        self.decide()

    def check_refusal(self, waiting: Waiting, error: ServiceError) -> None:
        new = sum(not w.resumes for w in self.waiting.values())
        match error.reason:
            case "QUEUE_FULL":
                assert new == MAX_QUEUE
                assert not waiting.resumes
            case "TENANT_CAP":
                assert not waiting.again
                own = [w for w in self.open() if w.tenant == waiting.tenant]
                tokens = sum(w.need.total_tokens for w in [*own, waiting])
                assert tokens > 400 or len(own) >= MAX_OPEN.get(waiting.tenant, 4)
            case "PREDICTED_WAIT":
                assert error.retry_after_s is not None
                assert self.now + error.retry_after_s > waiting.start_by
            case "NEVER_FITS":
                assert not self.ledger.fits_ever(waiting.need)
            case reason:
                assert reason == "NO_INSTANCE"
                assert not self.ledger.prefills() or not self.ledger.decodes()

    @rule(data=st.data())
    def prefill_ends(self, data: st.DataObject) -> None:
        if self.running:
            request_id = data.draw(st.sampled_from(sorted(self.running)))
            self.gate.end_prefill(request_id, self.now)
            if self.ledger.room_of(request_id) is None:
                del self.running[request_id]
            self.decide()

    @rule(data=st.data(), tokens=st.integers(1, 200))
    def sequence_grows(self, data: st.DataObject, tokens: int) -> None:
        if self.running:
            request_id = data.draw(st.sampled_from(sorted(self.running)))
            most = self.running[request_id].need.total_tokens
            tokens = min(tokens, most)
            booked = self.ledger.room_of(request_id)
            has_outgrown = self.gate.grow(request_id, tokens, self.now)
            if self.ledger.room_of(request_id):
                self.come_to[request_id] = max(tokens, self.come_to.get(request_id, 0))
            # Nobody is said to have outgrown a booking who has kept to it.
            assert not (has_outgrown and booked is not None and tokens <= booked)

    @rule(tenant=NAMES, lengths=st.lists(st.integers(1, 60), max_size=30), is_cut=st.booleans())
    def answers_are_finished(self, tenant: str, lengths: list[int], is_cut: bool) -> None:
        for tokens in lengths:
            self.gate.lengths.finished(tenant, tokens, is_cut=is_cut)

    @rule(data=st.data())
    def request_ends(self, data: st.DataObject) -> None:
        if self.running:
            request_id = data.draw(st.sampled_from(sorted(self.running)))
            del self.running[request_id]
            self.gate.release(request_id, self.now)
            self.gate.release(request_id, self.now)
            self.decide()

    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        if self.waiting:
            waiting = self.waiting.pop(data.draw(st.sampled_from(sorted(self.waiting))))
            self.gate.withdraw(waiting)
            self.gate.withdraw(waiting)
            self.gate.release(waiting.request_id, self.now)
            self.decide()

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while (moment := self.gate.next_moment(self.now)) is not None and moment <= until:
            self.now = max(self.now, moment)
            self.decide()
        self.now = until

    # ---- what must come of it

    def decide(self) -> None:
        self.take(self.gate.decide(self.now))
        # What is left does not fit, or comes behind one that was passed too often.
        prefills, decodes = self.ledger.prefills(), self.ledger.decodes()
        for waiting in self.gate.queue:
            need = waiting.need
            assert not (
                any(view.fits(need) for view in prefills)
                and (not need.decodes or any(view.fits(need) for view in decodes))
            )
            if waiting.overdue and self.ledger.fits_ever(need):
                break

    def take(self, decisions: list[Decision]) -> None:
        for waiting, decided in decisions:
            assert self.waiting.pop(waiting.request_id) is waiting
            if isinstance(decided, Placement):
                self.running[waiting.request_id] = waiting
            elif decided.reason == "QUEUE_WAIT":
                assert waiting.start_by <= self.now

    def open(self) -> list[Waiting]:
        return [*self.running.values(), *(w for w in self.waiting.values() if not w.resumes)]

    @invariant()
    def accounts_balance(self) -> None:
        if hasattr(self, "gate"):
            self.ledger.check_integrity()
            self.check_bookings()
            self.gate.queue.check_integrity()
            assert set(self.gate.queue) == set(self.waiting.values())
            assert all(w.start_by > self.now for w in self.waiting.values())

    def check_bookings(self) -> None:
        """What decode has is booked, and no more than all; so is the least it reserves at first."""
        for request_id, waiting in self.running.items():
            need, room = waiting.need, self.ledger.room_of(request_id)
            assert need.expected_new_tokens <= need.max_new_tokens
            assert need.expected_new_tokens == 0 or self.learns
            if room:
                assert room >= self.come_to.get(request_id, 0)
                assert room >= need.prompt_tokens + min(8, need.max_new_tokens)
                assert room < need.total_tokens + 16
                assert self.overcommits or room >= need.total_tokens
        found = self.gate.overcommit_risks()
        assert all(0 <= risk <= 1 for risk in found.values())
        assert self.overcommits or not found

    @invariant()
    def tenants_use_what_they_have_open(self) -> None:
        if hasattr(self, "gate"):
            for tenant in ("", "small", "large"):
                own = [w for w in self.open() if w.tenant == tenant]
                assert self.gate.usage(tenant) == Usage(
                    requests=len(own),
                    queued=sum(w.is_queued for w in own),
                    tokens=sum(w.need.total_tokens for w in own),
                )

    def teardown(self) -> None:
        if not hasattr(self, "gate"):
            return
        self.time_passes(60.0)
        assert not self.waiting  # each was admitted, or told that it is not
        for request_id in self.running:
            self.gate.release(request_id, self.now)
        assert self.ledger.is_idle()
        assert all(self.gate.usage(tenant) == Usage() for tenant in ("", "small", "large"))
        for view in self.ledger.decodes():
            assert view.free_blocks == view.capacity.blocks


TestAdmissionWalk: Any = AdmissionWalk.TestCase
TestAdmissionWalk.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


class LongAdmissionWalk(AdmissionWalk):
    """As long a walk as finds what a short one misses."""


LongAdmissionWalk.TestCase.settings = settings(
    max_examples=1000, stateful_step_count=100, deadline=None
)
TestLongAdmissionWalk: Any = pytest.mark.slow(pytest.mark.timeout(3600)(LongAdmissionWalk.TestCase))
