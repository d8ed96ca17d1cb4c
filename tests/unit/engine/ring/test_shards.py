"""Which rank has which tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ring import RingError, RingPlan, SequenceShards, zigzag
from engine.ring.shards import count, positions
from kvtransfer.layout import KVShape, uniform

COUNTS = st.integers(0, 200)
RANKS = st.integers(1, 6)
GRAINS = st.integers(1, 17)
SHAPE = KVShape(layers=1, kv_heads=1, head_size=8, dtype="float32")


@settings(deadline=None)
@given(total=COUNTS, ranks=RANKS, grain=GRAINS)
def test_cut_from_the_first_token_on_is_the_transfers_zigzag_layout(
    total: int, ranks: int, grain: int
) -> None:
    layout = uniform(SHAPE, grain, cp=ranks, cp_order="zigzag")
    theirs = tuple(
        tuple(range(span.begin, span.end) for span in layout.tokens_of(shard, total))
        for shard in layout.shards
    )
    assert zigzag(range(total), ranks, grain) == theirs


def test_rank_holds_an_early_and_a_late_chunk() -> None:
    assert zigzag(range(100, 112), 3) == (
        (range(100, 102), range(110, 112)),
        (range(102, 104), range(108, 110)),
        (range(104, 108),),
    )


@settings(deadline=None)
@given(start=COUNTS, each=st.integers(0, 40), ranks=RANKS)
def test_new_tokens_that_divide_evenly_make_equal_work(start: int, each: int, ranks: int) -> None:
    shards = SequenceShards.balanced(each * 2 * ranks, zigzag(range(start), ranks))
    assert len({int(np.sum(positions(pieces) + 1)) for pieces in shards.new}) == 1


@settings(deadline=None)
@given(start=COUNTS, more=COUNTS, ranks=RANKS)
def test_ragged_new_tokens_cost_two_tokens_of_balance(start: int, more: int, ranks: int) -> None:
    chunks = 2 * ranks
    shards = SequenceShards.balanced(chunks**2 + more, zigzag(range(start), ranks))
    work = [int(np.sum(positions(pieces) + 1)) for pieces in shards.new]
    # Fewer than `chunks` tokens are missing, all from the last chunk: each rank's part is two.
    assert max(work) - sum(work) / ranks <= 2 * (shards.end + chunks)


@settings(deadline=None)
@given(start=COUNTS, new=COUNTS, ranks=RANKS, grain=GRAINS, rest=COUNTS)
def test_chunk_of_a_layout_lies_where_the_layout_has_it(
    start: int, new: int, ranks: int, grain: int, rest: int
) -> None:
    total = start + new + rest
    shards = SequenceShards.of_layout(start, new, total=total, ranks=ranks, grain=grain)
    for rank, share in enumerate(zigzag(range(total), ranks, grain)):
        held = set(positions(shards.after()[rank]).tolist())
        assert held == set(positions(share).tolist()) & set(range(start + new))
    assert (shards.start, shards.end) == (start, start + new)


@settings(deadline=None)
@given(start=COUNTS, new=COUNTS, ranks=RANKS)
def test_token_order_undoes_the_cut(start: int, new: int, ranks: int) -> None:
    shards = SequenceShards.balanced(new, zigzag(range(start), ranks, 3))
    rows = np.concatenate([positions(pieces) for pieces in shards.new])
    assert rows[shards.token_order()].tolist() == list(range(start, start + new))
    for position in range(start, start + new):
        rank, row = shards.place_of(position)
        assert positions(shards.new[rank])[row] == position


def test_place_of_a_cached_token_is_refused() -> None:
    with pytest.raises(RingError, match="token 3 is not among the new ones, 4 to 9"):
        SequenceShards.balanced(5, zigzag(range(4), 2)).place_of(3)


@settings(deadline=None)
@given(start=COUNTS, new=COUNTS, ranks=RANKS, window=st.integers(1, 250))
def test_keys_before_every_window_take_no_part(
    start: int, new: int, ranks: int, window: int
) -> None:
    shards = SequenceShards.balanced(new, zigzag(range(start), ranks))
    keys = np.sort(np.concatenate([positions(shards.keys(rank, window)) for rank in range(ranks)]))
    first = max(0, start - window + 1) if new else start
    assert keys.tolist() == list(range(first, start + new))


@settings(deadline=None)
@given(lengths=st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=4), ranks=RANKS)
def test_rows_of_a_pass_follow_one_another_sequence_by_sequence(
    lengths: list[tuple[int, int]], ranks: int
) -> None:
    plan = RingPlan(
        tuple(SequenceShards.balanced(new, zigzag(range(start), ranks)) for start, new in lengths)
    )
    for rank in range(ranks):
        for parts, rows in ((plan.queries, plan.query_rows), (plan.keys, plan.key_rows)):
            assert [part.begin for part in parts[rank]] == [
                0,
                *(part.end for part in parts[rank][:-1]),
            ]
            assert all(part.end - part.begin == count(part.pieces) for part in parts[rank])
            assert parts[rank][-1].end == rows[rank]
    assert sum(plan.query_rows) == sum(new for _, new in lengths)
    assert sum(plan.key_rows) == sum(start + new for start, new in lengths if new)


@pytest.mark.parametrize(
    ("new", "cached"),
    [
        (((range(2),), ()), ((),)),  # on two ranks and on one
        ((), ()),
        (((range(2),), (range(1, 3),)), ((), ())),  # token 1 twice
        (((range(2),), (range(3, 4),)), ((), ())),  # token 2 is missing
        (((range(1, 2), range(1)), ()), ((), ())),  # descending
        (((range(2),), ()), ((range(1),), ())),  # new tokens begin within the cached ones
        (((range(0, 2, 2), range(1, 2)), ()), ((), ())),  # not one after another
    ],
)
def test_pieces_that_are_not_every_token_once_are_refused(
    new: tuple[tuple[range, ...], ...], cached: tuple[tuple[range, ...], ...]
) -> None:
    with pytest.raises(RingError):
        SequenceShards(new, cached)


def test_plans_that_make_no_sense_are_refused() -> None:
    two, three = (SequenceShards.balanced(5, ((),) * ranks) for ranks in (2, 3))
    with pytest.raises(RingError, match=r"same number of ranks, found \[2, 3\]"):
        RingPlan((two, three))
    with pytest.raises(RingError, match="same number of ranks"):
        RingPlan(())
    with pytest.raises(RingError, match="window has at least one token, found 0"):
        RingPlan((two,), window=0)
    with pytest.raises(RingError, match="at least one rank and grain"):
        zigzag(range(5), 0)
    with pytest.raises(RingError, match="5 tokens from 3 on are not in a sequence of 7"):
        SequenceShards.of_layout(3, 5, total=7, ranks=2, grain=1)
