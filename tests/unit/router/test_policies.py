"""What each policy goes by, and what all of them keep to."""

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from types import MappingProxyType
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.ledger import Capacity, DecodeView, InstanceKey, Ledger, Need, Placement, PrefillView
from router.policies import POLICIES, PolicyName
from router.policies.expected import Expected
from router.policies.least_loaded import LeastLoaded
from router.policies.prefix import PrefixOnly
from router.policies.round_robin import RoundRobin
from router.policy import RoutingPolicy
from router.views import AskEach, Link, Pace
from service.step_fit import StepSpeed

CAPACITY = Capacity(
    blocks=1000, block_size=16, max_sequences=64, max_sequence_tokens=16_000, token_bytes=1000
)
NEED = Need(prompt_tokens=1000, max_new_tokens=101)
NO_CACHE: Mapping[str, int] = MappingProxyType({})


def prefill(name: str, owed: int = 0, token_s: float | None = 1e-4, **ways: float) -> PrefillView:
    """An instance that computes a token in `token_s`; `ways` are bytes per second to decode."""
    speed = StepSpeed(base_s=0.0, sequence_s=0.0, token_s=token_s) if token_s is not None else None
    return PrefillView(
        key=InstanceKey(name, 1),
        capacity=CAPACITY,
        owed_tokens=(owed,),
        outstanding_requests=int(owed > 0),
        max_outstanding_requests=64,
        pace=Pace(speed=speed, links={to: Link(rate, 0.0) for to, rate in ways.items()}),
    )


_View = TypeVar("_View", DecodeView, PrefillView)


def in_order(views: list[_View]) -> list[_View]:
    """As the ledger gives them."""
    return sorted(views, key=lambda view: view.load)


def decode(
    name: str, sequences: int = 0, free: int = 1000, base_s: float | None = 0.02
) -> DecodeView:
    speed = StepSpeed(base_s=base_s, sequence_s=1e-3, token_s=1e-7) if base_s is not None else None
    return DecodeView(
        key=InstanceKey(name, 1),
        capacity=CAPACITY,
        free_blocks=free,
        sequences=sequences,
        pace=Pace(speed=speed),
    )


def placed(
    policy: RoutingPolicy,
    prefills: list[PrefillView],
    decodes: list[DecodeView],
    need: Need = NEED,
    cached: Mapping[str, int] = NO_CACHE,
) -> Placement | None:
    return policy.choose(
        in_order(prefills),
        in_order(decodes),
        need,
        AskEach(lambda key, _: cached.get(key.name, 0)),
    )


def names(placement: Placement | None) -> tuple[str, str]:
    assert placement is not None
    assert placement.prefill is not None
    assert placement.decode is not None
    return placement.prefill.name, placement.decode.name


# ---- expected times


def test_faster_prefill_wins_though_it_owes_more() -> None:
    prefills = [prefill("slow", owed=0, token_s=1e-3), prefill("fast", owed=5000, token_s=1e-4)]
    assert names(placed(Expected(), prefills, [decode("x")]))[0] == "fast"
    assert names(placed(LeastLoaded(), prefills, [decode("x")]))[0] == "slow"
    prefills[1] = prefill("fast", owed=50_000, token_s=1e-4)
    assert names(placed(Expected(), prefills, [decode("x")]))[0] == "slow"


def test_decode_with_the_shorter_step_wins_though_it_has_more_sequences() -> None:
    decodes = [decode("slow", sequences=0, base_s=0.1), decode("fast", sequences=4, base_s=0.02)]
    assert names(placed(Expected(), [prefill("p")], decodes))[1] == "fast"


def test_cached_beginning_is_worth_what_it_spares() -> None:
    prefills = [prefill("idle"), prefill("holder", owed=500)]
    known = {"holder": 800}
    assert names(placed(Expected(), prefills, [decode("x")], cached=known))[0] == "holder"
    prefills[1] = prefill("holder", owed=5000)
    assert names(placed(Expected(), prefills, [decode("x")], cached=known))[0] == "idle"


def test_slow_way_is_gone_around_unless_computing_hides_it() -> None:
    # A megabyte for each: a second over the slow way, which prefill's 0.1 s cannot hide.
    prefills = [prefill("a", x=1e6, y=1e6), prefill("b", x=1e9, y=1e9)]
    decodes = [decode("x"), decode("y")]
    assert names(placed(Expected(), prefills, decodes))[0] == "b"
    hidden = [prefill("a", x=2e7, y=2e7), prefill("b", owed=1, x=1e9, y=1e9)]
    assert names(placed(Expected(), hidden, decodes))[0] == "a"


def test_what_decode_has_already_needs_no_way() -> None:
    prefills = [prefill("a", x=1e6, y=1e6)]
    prefills.append(prefill("b", owed=20_000, x=1e9, y=1e9))
    decodes = [decode("x"), decode("y", sequences=1)]
    assert names(placed(Expected(), prefills, decodes, cached={"y": 960}))[1] == "y"


def test_limit_that_only_a_crowded_instance_keeps_is_kept() -> None:
    decodes = [decode("idle", base_s=0.06), decode("crowded", sequences=20, base_s=0.02)]
    assert names(placed(Expected(), [prefill("p")], decodes))[1] == "idle"
    tight = replace(NEED, tpot_s=0.055)
    assert names(placed(Expected(), [prefill("p")], decodes, tight))[1] == "crowded"


def test_where_no_instance_keeps_the_limit_the_least_late_is_taken() -> None:
    prefills = [prefill("a", owed=30_000), prefill("b", owed=40_000)]
    hopeless = replace(NEED, ttft_s=0.01, tpot_s=0.001)
    decodes = [decode("x", sequences=9), decode("y", sequences=8)]
    assert names(placed(Expected(), prefills, decodes, hopeless)) == ("a", "y")


def test_new_instance_is_taken_to_be_as_fast_as_the_others() -> None:
    prefills = [prefill("a", owed=1000), prefill("new", token_s=None)]
    decodes = [decode("x", sequences=2), decode("new", base_s=None)]
    assert names(placed(Expected(), prefills, decodes)) == ("new", "new")
    prefills = [prefill("a"), prefill("new", owed=1000, token_s=None)]
    decodes = [decode("x"), decode("new", sequences=2, base_s=None)]
    assert names(placed(Expected(), prefills, decodes)) == ("a", "x")


@settings(deadline=None)
@given(data=st.data())
def test_as_long_as_nothing_is_measured_the_least_loaded_is_taken(data: st.DataObject) -> None:
    few = st.integers(0, 5)
    prefills = [
        prefill(f"p{i}", owed=100 * data.draw(few), token_s=None) for i in range(data.draw(few) + 1)
    ]
    decodes = [
        decode(f"d{i}", data.draw(few), 500 + data.draw(few), base_s=None)
        for i in range(data.draw(few) + 1)
    ]
    known = {f"{role}{i}": 16 * data.draw(few) for role in "pd" for i in range(6)}
    assert placed(Expected(), prefills, decodes, cached=known) == placed(
        LeastLoaded(), prefills, decodes, cached=known
    )


def test_instances_that_steps_do_not_tell_apart_are_filled_evenly() -> None:
    ledger = Ledger(max_prefill_requests=64)
    ledger.add_prefill(InstanceKey("p", 1), CAPACITY)
    constant = Pace(speed=StepSpeed(base_s=0.02, sequence_s=0.0, token_s=0.0))
    for name in ("x", "y", "z"):
        ledger.add_decode(InstanceKey(name, 1), CAPACITY)
        ledger.set_pace(InstanceKey(name, 1), constant)
    need = Need(prompt_tokens=100, max_new_tokens=100)
    for request_id in range(12):
        placement = placed(Expected(), ledger.prefills(), ledger.decodes(), need)
        assert placement is not None
        assert ledger.try_reserve(request_id, need, placement)
    assert {view.sequences for view in ledger.decodes()} == {4}
    ledger.check_integrity()


def test_ranks_of_one_instance_are_compared_by_what_each_owes() -> None:
    wide = replace(
        prefill("wide"),
        capacity=replace(CAPACITY, block_size=32, cp=2),
        owed_tokens=(90, 10),
    )
    placement = placed(Expected(), [wide], [decode("x")], Need(prompt_tokens=16, max_new_tokens=2))
    assert placement is not None
    assert placement.cp_first == 1


# ---- round robin, prefix


def test_round_robin_takes_one_after_the_other_once_they_are_booked() -> None:
    ledger, policy, taken = Ledger(max_prefill_requests=64), RoundRobin(), []
    for name in ("a", "b", "c"):
        ledger.add_prefill(InstanceKey(name, 1), CAPACITY)
        ledger.add_decode(InstanceKey("to-" + name, 1), CAPACITY)
    for request_id in range(6):
        for _ in range(3):  # asked more than once before it is booked
            placement = placed(policy, ledger.prefills(), ledger.decodes())
        assert placement is not None
        assert ledger.try_reserve(request_id, NEED, placement)
        taken.append(names(placement))
    assert taken == [(name, "to-" + name) for name in "abcabc"]


def test_prefix_alone_goes_where_most_is_cached_whatever_waits_there() -> None:
    prefills = [prefill("idle"), prefill("holder", owed=50_000)]
    decodes = [decode("idle"), decode("holder", sequences=50, free=200)]
    assert names(placed(PrefixOnly(), prefills, decodes, cached={"holder": 16})) == (
        "holder",
        "holder",
    )
    assert names(placed(PrefixOnly(), prefills, decodes)) == ("idle", "idle")


# ---- all of them


@pytest.mark.parametrize("name", list(POLICIES))
@settings(deadline=None)
@given(data=st.data())
def test_placement_fits_wherever_there_is_one(name: PolicyName, data: st.DataObject) -> None:
    speeds = st.sampled_from([None, 1e-4, 1e-3])
    ledger = Ledger(max_prefill_requests=2)
    small = replace(CAPACITY, blocks=20, max_sequences=2, max_sequence_tokens=320)
    for i in range(data.draw(st.integers(1, 3))):
        key = InstanceKey(f"p{i}", 1)
        ledger.add_prefill(key, replace(small, cp=data.draw(st.sampled_from([1, 2]))))
        ledger.set_pace(key, prefill("p", token_s=data.draw(speeds), d0=1e8).pace)
    for i in range(data.draw(st.integers(1, 3))):
        key = InstanceKey(f"d{i}", 1)
        ledger.add_decode(key, replace(small, dp=data.draw(st.sampled_from([1, 2]))))
        ledger.set_pace(key, decode("d", base_s=data.draw(speeds)).pace)
    policy = POLICIES[name]()
    cached = {f"p{i}": 16 * data.draw(st.integers(0, 3)) for i in range(3)}
    for request_id in range(8):
        need = Need(
            prompt_tokens=data.draw(st.integers(1, 200)),
            max_new_tokens=data.draw(st.integers(1, 80)),
            ttft_s=data.draw(st.sampled_from([inf, 0.01])),
            tpot_s=data.draw(st.sampled_from([inf, 0.01])),
        )
        views = ledger.prefills(), ledger.decodes()
        placement = placed(policy, *views, need, cached)
        exists = placed(LeastLoaded(), *views, need, cached) is not None
        assert (placement is not None) == exists
        if placement is not None:
            assert placement.prefill is not None
            assert ledger.try_reserve(request_id, need, placement)
            assert placement.cached_tokens == cached[placement.prefill.name]
        ledger.check_integrity()
