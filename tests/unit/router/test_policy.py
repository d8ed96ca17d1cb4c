"""Which instances a request goes to."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.ledger import Capacity, DecodeView, InstanceKey, Ledger, Need, PrefillView
from router.policies.least_loaded import LeastLoaded
from router.views import AskEach, NothingCached

CAPACITY = Capacity(blocks=10, block_size=16, max_sequences=4, max_sequence_tokens=128)
NEED = Need(prompt_tokens=20, max_new_tokens=20)


def prefill(name: str, tokens: int = 0, requests: int = 0) -> PrefillView:
    return PrefillView(
        key=InstanceKey(name, 1),
        capacity=CAPACITY,
        owed_tokens=(tokens,),
        outstanding_requests=requests,
        max_outstanding_requests=4,
    )


def wide(name: str, *owed_tokens: int) -> PrefillView:
    """An instance over several cp ranks that deals 16 tokens to each in turn."""
    ranks = len(owed_tokens)
    capacity = Capacity(
        blocks=10, block_size=16 * ranks, max_sequences=4, max_sequence_tokens=1000, cp=ranks
    )
    return replace(prefill(name), capacity=capacity, owed_tokens=owed_tokens)


_View = TypeVar("_View", DecodeView, PrefillView)


def in_order(views: list[_View]) -> list[_View]:
    """As the ledger gives them."""
    return sorted(views, key=lambda view: view.load)


def decode(name: str, free: int = 10, sequences: int = 0) -> DecodeView:
    return DecodeView(
        key=InstanceKey(name, 1), capacity=CAPACITY, free_blocks=free, sequences=sequences
    )


def chosen(
    prefills: list[PrefillView],
    decodes: list[DecodeView],
    need: Need = NEED,
    cached: Mapping[str, int] = MappingProxyType({}),
) -> tuple[str, str] | None:
    placement = LeastLoaded().choose(
        in_order(prefills),
        in_order(decodes),
        need,
        AskEach(lambda key, _: cached.get(key.name, 0)),
    )
    if placement is None:
        return None
    assert placement.prefill is not None
    return placement.prefill.name, placement.decode.name if placement.decode else ""


def test_least_owed_prefill_and_roomiest_decode() -> None:
    prefills = [prefill("a", tokens=50), prefill("b", tokens=10), prefill("c", tokens=20)]
    decodes = [decode("x", free=4), decode("y", free=8), decode("z", free=5)]
    assert chosen(prefills, decodes) == ("b", "y")


def test_among_equals_the_fewest_sequences_then_the_name() -> None:
    assert chosen([prefill("b"), prefill("a")], [decode("x", 5, 3), decode("y", 5, 1)]) == (
        "a",
        "y",
    )


def test_full_instances_are_not_chosen() -> None:
    assert chosen([prefill("a", requests=4)], [decode("x")]) is None
    assert chosen([prefill("a")], [decode("x", free=2)]) is None
    assert chosen([prefill("a")], [decode("x", sequences=4), decode("y", free=3)]) == ("a", "y")


def test_prompt_longer_than_an_instance_takes_goes_nowhere() -> None:
    assert chosen([prefill("a")], [decode("x")], Need(prompt_tokens=129, max_new_tokens=1)) is None
    assert chosen([prefill("a")], [decode("x")], Need(prompt_tokens=100, max_new_tokens=40)) is None


def test_one_token_goes_to_prefill_alone() -> None:
    assert chosen([prefill("a")], [], Need(prompt_tokens=20, max_new_tokens=1)) == ("a", "")


@pytest.mark.parametrize(("queue", "winner"), [(0, "holder"), (15, "holder"), (17, "idle")])
def test_cached_beginning_is_worth_the_tokens_it_saves(queue: int, winner: str) -> None:
    prefills = [prefill("idle"), prefill("holder", tokens=queue, requests=1)]
    assert chosen(prefills, [decode("x")], cached={"holder": 16}) == (winner, "x")


def beginning(prefills: list[PrefillView], tokens: int) -> tuple[str, int | None]:
    need = Need(prompt_tokens=tokens, max_new_tokens=1)
    placement = LeastLoaded().choose(in_order(prefills), [], need, NothingCached())
    assert placement is not None
    assert placement.prefill is not None
    return placement.prefill.name, placement.cp_first


def test_short_prompt_begins_where_it_is_done_first() -> None:
    assert beginning([wide("a", 50, 10, 30)], tokens=16) == ("a", 1)
    assert beginning([wide("a", 0, 0, 0)], tokens=16) == ("a", 0)
    # Of two ranks' length: what the busier of both owes is what counts.
    assert beginning([wide("a", 50, 10, 30)], tokens=32) == ("a", 1)
    assert beginning([wide("a", 20, 10, 60)], tokens=32) == ("a", 0)
    # A busy instance whose one rank is free is as good as an idle one of one rank.
    assert beginning([wide("b", 90, 0), prefill("c", tokens=5)], tokens=16) == ("b", 1)


def test_load_does_not_say_where_a_prompt_begins_that_may_be_known() -> None:
    assert beginning([wide("a", 50, 10, 30)], tokens=48) == ("a", 0)
    assert beginning([wide("a", 50, 10, 30)], tokens=49) == ("a", None)


def test_long_prompt_waits_for_the_busiest_rank() -> None:
    assert beginning([wide("a", 90, 0), wide("b", 50, 50)], tokens=100) == ("b", None)


def test_full_holder_is_passed_by() -> None:
    prefills = [prefill("holder", requests=4), prefill("other", tokens=50)]
    assert chosen(prefills, [decode("x")], cached={"holder": 16}) == ("other", "x")


def test_placement_says_what_is_thought_to_be_cached_where_it_goes() -> None:
    cached = {"a": 4, "b": 16, "x": 8}
    views = [prefill("a"), prefill("b")]
    placement = LeastLoaded().choose(
        views, [decode("x")], NEED, AskEach(lambda key, _: cached[key.name])
    )
    assert placement is not None
    assert placement.prefill is not None
    assert (placement.prefill.name, placement.cached_tokens) == ("b", 16)


def test_cache_is_not_asked_where_no_decode_instance_has_room() -> None:
    def never(key: InstanceKey, dp_rank: int) -> int:
        raise AssertionError(key)

    full = [decode("x", free=0)]
    assert LeastLoaded().choose([prefill("a")], full, NEED, AskEach(never)) is None


@pytest.mark.parametrize(("used", "winner"), [(0, "holder"), (1, "holder"), (2, "idle")])
def test_known_beginning_at_decode_is_worth_as_much_room(used: int, winner: str) -> None:
    """17 tokens known are more than one block of 16 in use, and less than two."""
    decodes = [decode("idle"), decode("holder", free=10 - used)]
    assert chosen([prefill("a")], decodes, cached={"holder": 17}) == ("a", winner)


def test_holder_without_room_at_decode_is_passed_by() -> None:
    decodes = [decode("idle"), decode("holder", free=2), decode("full", sequences=4)]
    cached = {"holder": 20, "full": 20}
    assert chosen([prefill("a")], decodes, cached=cached) == ("a", "idle")


DECODES = st.lists(
    st.tuples(st.integers(3, 10), st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=4
)


@given(instances=DECODES)
def test_no_decode_instance_is_taken_for_more_than_what_it_knows_is_worth(
    instances: list[tuple[int, int, int]],
) -> None:
    views = [decode(str(i), free, n) for i, (free, n, _) in enumerate(instances)]
    cached = {str(i): tokens for i, (*_, tokens) in enumerate(instances)}
    found = chosen([prefill("a")], views, cached=cached)
    assert found is not None
    [winner] = [view for view in views if view.key.name == found[1]]
    for view in views:
        more = (view.free_blocks - winner.free_blocks) * CAPACITY.block_size
        assert more <= cached[winner.key.name] - cached[view.key.name]
    knowing_more = {**cached, found[1]: cached[found[1]] + 1}
    assert chosen([prefill("a")], views, cached=knowing_more) == found
    if not any(cached.values()):
        assert winner.free_blocks == max(view.free_blocks for view in views)


@given(known=st.integers(0, 60), new_tokens=st.integers(2, 40), requests=st.integers(1, 24))
def test_prompts_that_all_begin_alike_are_not_all_given_to_their_holder(
    known: int, new_tokens: int, requests: int
) -> None:
    """None of them ends: the holder is at most one of them ahead, and what it knows."""
    need = Need(prompt_tokens=61, max_new_tokens=new_tokens)
    large = Capacity(blocks=400, block_size=16, max_sequences=64, max_sequence_tokens=512)
    ledger = Ledger(max_prefill_requests=64)
    ledger.add_prefill(InstanceKey("a", 1), large)
    for name in ("holder", "idle"):
        ledger.add_decode(InstanceKey(name, 1), large)
    for request_id in range(requests):
        placement = LeastLoaded().choose(
            ledger.prefills(),
            ledger.decodes(),
            need,
            AskEach(lambda key, _: known if key.name == "holder" else 0),
        )
        assert placement is not None
        assert ledger.try_reserve(request_id, need, placement)
    held = {key: 16 * ledger.reserved_blocks(InstanceKey(key, 1)) for key in ("holder", "idle")}
    one = 16 * large.blocks_for(need.total_tokens)
    assert held["holder"] - held["idle"] + one >= 0
    assert held["holder"] - held["idle"] <= known + one


def by_looking_at_all(
    prefills: list[PrefillView], decodes: list[DecodeView], need: Need, cached: Mapping[str, int]
) -> tuple[str, int, str, int] | None:
    """What is chosen where every instance and every beginning is compared with all others."""
    begins = [
        (
            p.tokens_until(need.prompt_tokens, cached.get(p.key.name, 0), first),
            p.outstanding_requests,
            p.key,
            first,
        )
        for p in prefills
        if p.fits(need)
        for first in range(p.capacity.cp if need.prompt_tokens <= p.capacity.block_size else 1)
    ]
    rooms = [
        (-d.room(cached.get(d.key.name, 0)), d.sequences, d.key, d.dp_rank)
        for d in decodes
        if d.fits(need)
    ]
    if not begins or not rooms:
        return None
    *_, prefill_key, first = min(begins)
    *_, decode_key, dp_rank = min(rooms)
    return prefill_key.name, first, decode_key.name, dp_rank


@given(data=st.data())
def test_the_choice_is_that_of_comparing_all_with_all(data: st.DataObject) -> None:
    few = st.integers(0, 4)
    owed = data.draw(st.lists(st.lists(few, min_size=1, max_size=3), min_size=1, max_size=6))
    prefills = [
        replace(
            wide(f"p{number}", *(16 * tokens for tokens in each)),
            outstanding_requests=data.draw(few),
        )
        for number, each in enumerate(owed)
    ]
    decodes = [
        replace(
            decode(f"d{number // 2}", free=data.draw(st.integers(0, 10)), sequences=each),
            dp_rank=number % 2,
            capacity=replace(CAPACITY, expected_output_tokens=data.draw(few) * 4),
        )
        for number, each in enumerate(data.draw(st.lists(few, min_size=1, max_size=8)))
    ]
    names = [f"p{number}" for number in range(6)] + [f"d{number}" for number in range(4)]
    cached = data.draw(st.dictionaries(st.sampled_from(names), st.integers(0, 40), max_size=4))
    need = Need(prompt_tokens=data.draw(st.integers(1, 60)), max_new_tokens=20)
    placement = LeastLoaded().choose(
        in_order(prefills),
        in_order(decodes),
        need,
        AskEach(lambda key, _: cached.get(key.name, 0)),
    )
    expected = by_looking_at_all(prefills, decodes, need, cached)
    if expected is None:
        assert placement is None
    else:
        assert placement is not None
        assert placement.decode is not None
        prefill_name, first, *rest = expected
        assert [placement.decode.name, placement.dp_rank] == rest
        assert placement.prefill is not None
        assert placement.prefill.name == prefill_name
        assert placement.cp_first in (None, first)


@given(
    smaller=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    more=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    free=st.integers(0, 10),
    expected=st.integers(0, 40),
    sequences=st.integers(0, 4),
)
def test_what_does_not_fit_fits_no_better_with_more_tokens(
    smaller: tuple[int, int],
    more: tuple[int, int],
    free: int,
    expected: int,
    sequences: int,
) -> None:
    need = Need(prompt_tokens=smaller[0], max_new_tokens=smaller[1])
    larger = Need(prompt_tokens=smaller[0] + more[0], max_new_tokens=smaller[1] + more[1])
    capacity = replace(CAPACITY, expected_output_tokens=expected)
    view = replace(decode("d", free=free, sequences=sequences), capacity=capacity)
    if need.decodes and chosen([prefill("p")], [view], need) is None:
        assert chosen([prefill("p")], [view], larger) is None
    if need.total_tokens <= view.surely_fits:
        assert view.fits(need)
