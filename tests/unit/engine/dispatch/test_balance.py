"""Hot experts get replicas, ranks get like loads, and what need not move stays."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.dispatch import ExpertMap
from engine.dispatch.balance import Slots, balanced, imbalance, in_parts, rank_loads


def even(experts: int, ranks: int, spare: int) -> Slots:
    """Neighbours on each rank, and in its spare slots those that come next."""
    part = experts // ranks
    return tuple(
        tuple((rank * part + i) % experts for i in range(part + spare)) for rank in range(ranks)
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], Slots]:
    ranks = draw(st.integers(1, 6))
    part = draw(st.integers(1, 5))
    experts = ranks * part
    spare = draw(st.integers(0, experts - part))
    loads = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    return loads, even(experts, ranks, spare)


@settings(max_examples=400, deadline=None)
@given(case=cases())
def test_every_expert_has_a_slot_and_one_replica_on_a_rank_at_most(
    case: tuple[list[int], Slots],
) -> None:
    loads, now = case
    found = balanced(loads, now)
    assert [len(held) for held in found] == [len(held) for held in now]
    assert all(len(set(held)) == len(held) for held in found)
    assert {e for held in found for e in held} == set(range(len(loads)))
    assert sum(rank_loads(loads, found)) == pytest.approx(sum(loads))


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_no_rank_is_far_above_what_cannot_be_split(case: tuple[list[int], Slots]) -> None:
    loads, now = case
    ranks = rank_loads(loads, balanced(loads, now))
    # Greedy packing leaves no more than the largest piece between a rank and the mean; the largest
    # piece is what its replicas leave of it.
    assert max(ranks) <= sum(loads) / len(ranks) + max(loads) + 1e-6


def test_hot_expert_is_replicated_and_evens_the_ranks() -> None:
    loads = [900, 10, 10, 10, 10, 10, 10, 40]
    now = even(8, 4, spare=1)
    assert imbalance(loads, even(8, 4, spare=0)) > 3.5
    found = balanced(loads, now)
    assert sum(0 in held for held in found) == 4
    assert imbalance(loads, found) < 1.1


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_balanced_map_stays_as_it_is(case: tuple[list[int], Slots]) -> None:
    loads, now = case
    found = balanced(loads, now)
    again = balanced(loads, found)
    assert [set(held) for held in again] == [set(held) for held in found]
    assert again == found


@settings(max_examples=300, deadline=None)
@given(case=cases(), most=st.integers(1, 4))
def test_parts_of_a_change_are_small_and_lose_no_expert(
    case: tuple[list[int], Slots], most: int
) -> None:
    loads, now = case
    to = balanced(loads, now)
    parts = in_parts(now, to, most)
    assert (parts[-1] if parts else now) == to
    for before, after in pairwise([now, *parts]):
        assert before != after
        ExpertMap(len(loads), after)  # valid: each expert has a slot, and none two on a rank
        changed = [
            sum(x != y for x, y in zip(old, new, strict=True))
            for old, new in zip(before, after, strict=True)
        ]
        assert max(changed) <= most or len(in_parts(before, after, most)) == 1


def test_two_pairs_change_places_one_after_the_other() -> None:
    now, to = ((0, 1), (2, 3)), ((2, 3), (0, 1))
    assert in_parts(now, to, 2) == [to]
    first, last = in_parts(now, to, 1)
    assert first in (((2, 1), (0, 3)), ((0, 3), (2, 1)))
    assert last == to
    assert in_parts(to, to, 1) == []


def test_no_load_is_even() -> None:
    assert imbalance([0, 0], ((0,), (1,))) == 1.0
