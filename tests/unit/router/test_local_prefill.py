"""Which prompts a decode instance computes itself."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from twinpool.v1 import worker_pb2

from router.fairness import Tenants
from router.gate import Gate
from router.ledger import Ledger
from router.local_prefill import Costs, LocalPrefill, Work, disaggregated_s, is_local, local_s
from router.membership import Instance
from router.policies.least_loaded import LeastLoaded
from router.queue import Waiting
from router.views import AskEach, CachedTokens, Capacity, InstanceKey, Need, Placement
from service.errors import Unavailable
from tests.unit.router.test_membership import instance

PREFILL, DECODE, OTHER = (InstanceKey(name, 1) for name in ("prefill", "decode", "other"))
CAPACITY = Capacity(blocks=100, block_size=16, max_sequences=8, max_sequence_tokens=1600)
COMPUTES = replace(CAPACITY, local_prefill_tokens=32)
MOST = 64
KNOWN = Costs(prefill_token_s=0.001, prefill_s=0.010, handoff_s=0.005, local_step_s=0.010)
WORK = Work(owed=0, prefill=30, local_owed=0, local=30, local_step=32)


def decode(name: str = "decode") -> Instance:
    """One that computes 32 tokens of prompts in a step."""
    wire = worker_pb2.Capacity(
        blocks=100,
        block_size=16,
        max_sequences=8,
        max_sequence_tokens=1600,
        local_prefill_tokens=32,
    )
    return instance(name=name, epoch=1, capacity=wire)


def cached(tokens: Mapping[InstanceKey, int] = {}) -> CachedTokens:
    return AskEach(lambda key, _: tokens.get(key, 0))


def test_ways_cost_what_is_before_them_and_what_they_do() -> None:
    assert disaggregated_s(WORK, KNOWN) == pytest.approx(0.030 + 0.005)
    assert disaggregated_s(replace(WORK, prefill=2), KNOWN) == pytest.approx(0.010 + 0.005)
    assert disaggregated_s(replace(WORK, owed=100), KNOWN) == pytest.approx(0.1 + 0.030 + 0.005)
    assert local_s(WORK, KNOWN) == pytest.approx(0.010)
    assert local_s(replace(WORK, local=33), KNOWN) == pytest.approx(0.020)
    assert local_s(replace(WORK, local_owed=64), KNOWN) == pytest.approx(0.030)


@pytest.mark.parametrize(
    ("work", "costs", "expected"),
    [
        (WORK, KNOWN, True),
        (WORK, replace(KNOWN, local_step_s=0.036), False),
        (replace(WORK, owed=1), replace(KNOWN, local_step_s=0.0355), True),
        (replace(WORK, local=MOST + 1), KNOWN, False),
        (replace(WORK, local_step=0), KNOWN, False),
        # What is not known is tried, prefill first.
        (WORK, Costs(), False),
        (WORK, replace(KNOWN, handoff_s=None), False),
        (WORK, replace(KNOWN, local_step_s=None), True),
    ],
)
def test_sooner_way_is_taken(work: Work, costs: Costs, expected: bool) -> None:
    assert is_local(work, costs, MOST) is expected


class System:
    """A gate over one prefill and two decode instances, of which one computes prompts."""

    def __init__(self, max_tokens: int = MOST, *, has_prefill: bool = True) -> None:
        self.ledger = Ledger(max_prefill_requests=4)
        self.local = LocalPrefill(max_tokens)
        self.gate = Gate(
            ledger=self.ledger,
            policy=LeastLoaded(),
            tenants=Tenants(),
            max_queue=8,
            max_bypasses=8,
            grace_s=1.0,
            refuses_early=False,
            local=self.local,
        )
        if has_prefill:
            self.ledger.add_prefill(PREFILL, CAPACITY)
        self.ledger.add_decode(DECODE, COMPUTES)
        self.gate.instances_changed(0.0)
        self._next_id = 0

    def learn(self) -> None:
        """Prefill takes long, decode does not."""
        self.local.computed_at_prefill(PREFILL, 20, 0.1)
        self.local.sent(PREFILL, 0.1)
        self.local.computed_at_decode(decode(), 20, 0.001)

    def place(self, prompt: int, new: int = 8, **tokens: int) -> Placement | None:
        self._next_id += 1
        keys = {key: tokens[key.name] for key in (PREFILL, DECODE, OTHER) if key.name in tokens}
        waiting = Waiting(
            request_id=self._next_id,
            need=Need(prompt_tokens=prompt, max_new_tokens=new),
            priority=0,
            start_by=100.0,
            cached_tokens=cached(keys),
        )
        self.gate.offer(waiting, 0.0)
        decisions = self.gate.decide(0.0)
        self.ledger.check_integrity()
        return next((found for _, found in decisions if isinstance(found, Placement)), None)


def test_short_prompt_is_placed_without_prefill_and_owes_nothing_there() -> None:
    system = System()
    system.learn()
    placement = system.place(40)
    assert placement == Placement(prefill=None, decode=DECODE)
    [view] = system.ledger.prefills()
    assert view.owed_tokens == (0,)
    assert system.local.owed(DECODE) == 40
    system.gate.end_prefill(1, 1.0)
    assert system.local.owed(DECODE) == 0
    system.gate.release(1, 2.0)
    assert system.ledger.is_idle()


def test_abandoned_prompt_is_owed_no_more() -> None:
    system = System()
    system.learn()
    system.place(40)
    system.gate.release(1, 1.0)
    assert system.local.owed(DECODE) == 0
    assert system.ledger.is_idle()


@pytest.mark.parametrize(
    ("prompt", "new", "known", "is_here"),
    [
        (MOST, 8, 0, True),
        (MOST + 1, 8, 0, False),
        (MOST + 48, 8, 48, True),
        (MOST + 49, 8, 48, False),
        (40, 1, 0, False),
    ],
)
def test_bound_is_on_what_decode_lacks(prompt: int, new: int, known: int, is_here: bool) -> None:
    system = System()
    system.learn()
    placement = system.place(prompt, new, decode=known)
    assert placement is not None
    assert (placement.prefill is None) is is_here
    assert placement.cached_tokens == (known if is_here else 0)


def test_last_token_is_computed_however_much_is_known() -> None:
    system = System()
    system.learn()
    system.place(48, decode=48)
    assert system.local.owed(DECODE) == 1


@pytest.mark.parametrize("max_tokens", [0, MOST])
def test_instances_that_compute_no_prompts_are_never_asked_to(max_tokens: int) -> None:
    system = System(max_tokens)
    system.learn()
    if max_tokens:
        system.ledger.remove(DECODE)
        system.ledger.add_decode(OTHER, CAPACITY)
    placement = system.place(8)
    assert placement is not None
    assert placement.prefill == PREFILL


def test_without_prefill_short_prompts_go_on_and_others_are_told() -> None:
    system = System(has_prefill=False)
    assert system.place(40) == Placement(prefill=None, decode=DECODE)
    assert system.place(500, decode=480) == Placement(
        prefill=None, decode=DECODE, cached_tokens=480
    )
    with pytest.raises(Unavailable, match="no prefill instance"):
        system.place(500)
    with pytest.raises(Unavailable, match="no prefill instance"):
        system.place(40, 1)


def test_full_prefill_holds_up_no_prompt_that_decode_may_compute() -> None:
    system = System()
    for _ in range(4):
        system.place(100)
    assert system.place(200) is None
    assert system.place(210, decode=208) == Placement(
        prefill=None, decode=DECODE, cached_tokens=208
    )


def test_waiting_prompts_make_decode_look_worse() -> None:
    system = System()
    system.local.computed_at_prefill(PREFILL, 20, 0.010)
    system.local.sent(PREFILL, 0.010)
    system.local.computed_at_decode(decode(), 20, 0.009)
    ways = [system.place(30) for _ in range(4)]
    assert [way is not None and way.prefill is None for way in ways] == [True, True, False, False]


def test_way_that_looks_worse_is_tried_again() -> None:
    local = LocalPrefill(MOST)
    local.computed_at_prefill(PREFILL, 20, 0.001)
    local.sent(PREFILL, 0.001)
    local.computed_at_decode(decode(), 20, 1.0)
    asked = 0
    while not is_local(WORK, local.costs(PREFILL, DECODE), MOST):
        local.computed_at_prefill(PREFILL, 20, 0.001)
        local.sent(PREFILL, 0.001)
        asked += 1
    assert 100 < asked < 1000
    local.computed_at_decode(decode(), 20, 0.0001)
    asked = 0
    while is_local(WORK, local.costs(PREFILL, DECODE), MOST):
        local.computed_at_decode(decode(), 20, 0.0001)
        asked += 1
    assert 50 < asked < 1000


def test_bad_instance_is_tried_no_more_often_for_there_being_good_ones() -> None:
    local = LocalPrefill(MOST)
    local.computed_at_prefill(PREFILL, 20, 0.001)
    local.sent(PREFILL, 0.001)
    names = [f"decode-{number}" for number in range(10)]
    for name in names:
        local.computed_at_decode(decode(name), 20, 1.0)
    asked = 0
    while not is_local(WORK, local.costs(PREFILL, InstanceKey(names[0], 1)), MOST):
        local.computed_at_prefill(PREFILL, 20, 0.001)
        asked += 1
    assert asked > 1000


def test_long_prompts_tell_the_rate_and_short_ones_the_time() -> None:
    local = LocalPrefill(MOST)
    local.computed_at_prefill(PREFILL, 1000, 2.0)
    assert local.costs(PREFILL, DECODE) == Costs(prefill_token_s=0.002)
    local.computed_at_prefill(PREFILL, 10, 0.5)
    assert local.costs(PREFILL, DECODE) == Costs(prefill_token_s=0.002, prefill_s=0.5)


def test_instance_begins_with_what_others_take_and_goes_its_own_way() -> None:
    local = LocalPrefill(MOST)
    slow = InstanceKey("slow", 1)
    for _ in range(50):
        local.computed_at_prefill(PREFILL, 1000, 1.0)
        local.sent(PREFILL, 0.01)
        local.computed_at_decode(decode(), 64, 0.2)
    others = Costs(prefill_token_s=0.001, handoff_s=0.01, local_step_s=0.1)
    assert local.costs(PREFILL, DECODE).local_step_s == pytest.approx(0.1)
    assert local.costs(slow, OTHER).prefill_token_s == pytest.approx(others.prefill_token_s)
    for _ in range(50):
        local.computed_at_prefill(slow, 1000, 4.0)
        local.computed_at_decode(decode("other"), 32, 0.4)
    assert local.costs(slow, OTHER).prefill_token_s == pytest.approx(0.004, rel=0.05)
    assert local.costs(slow, OTHER).local_step_s == pytest.approx(0.4, rel=0.05)
    assert local.costs(PREFILL, DECODE).prefill_token_s == pytest.approx(0.001)
    assert local.costs(PREFILL, DECODE).local_step_s == pytest.approx(0.1)


def test_instance_that_has_gone_is_forgotten() -> None:
    system = System()
    system.local.computed_at_prefill(PREFILL, 1000, 3.0)
    system.local.computed_at_prefill(OTHER, 1000, 1.0)
    system.local.computed_at_prefill(OTHER, 1000, 1.0)
    system.gate.instances_changed(1.0)
    of_all = system.local.costs(None, None)
    assert system.local.costs(OTHER, None) == of_all
    assert system.local.costs(PREFILL, None) != of_all
