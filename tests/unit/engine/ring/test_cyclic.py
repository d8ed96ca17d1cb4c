"""Where a token lies follows from its position, and no two tokens lie in one cell."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.ring import RingError
from engine.ring.cyclic import Dealing
from engine.ring.shards import count, positions

DEALINGS = st.builds(Dealing, st.integers(1, 5), st.integers(1, 24))


@given(DEALINGS, st.integers(0, 300), st.integers(0, 300))
def test_every_token_is_dealt_once_there_and_back(
    dealing: Dealing, start: int, length: int
) -> None:
    tokens = range(start, start + length)
    owner = {
        position: rank
        for rank in range(dealing.ranks)
        for position in positions(dealing.pieces(rank, tokens))
    }
    there_and_back = [*range(dealing.ranks), *reversed(range(dealing.ranks))]
    for position in tokens:
        assert owner[position] == there_and_back[position // dealing.grain % len(there_and_back)]
    assert len(owner) == length


@given(DEALINGS, st.integers(0, 300), st.integers(0, 300), st.integers(0, 4))
def test_sequence_begins_at_the_rank_that_it_is_given(
    dealing: Dealing, start: int, length: int, first: int
) -> None:
    first %= dealing.ranks
    shards, turned = dealing.shards(start, length), dealing.shards(start, length, first)
    for rank in range(dealing.ranks):
        assert turned.new[(rank + first) % dealing.ranks] == shards.new[rank]
        assert turned.cached[(rank + first) % dealing.ranks] == shards.cached[rank]


@given(DEALINGS, st.integers(0, 300), st.integers(1, 300))
def test_chunks_of_a_prompt_lie_where_the_whole_prompt_does(
    dealing: Dealing, start: int, length: int
) -> None:
    shards = dealing.shards(start, length)
    assert (shards.start, shards.end) == (start, start + length)
    assert shards.after() == dealing.shards(0, start + length).new


@given(DEALINGS, st.integers(1, 4), st.integers(1, 200))
def test_tokens_of_a_rank_fill_its_blocks_one_after_another(
    dealing: Dealing, blocks_in_grain: int, length: int
) -> None:
    block_size = dealing.grain
    dealing = Dealing(dealing.ranks, dealing.grain * blocks_in_grain)
    table = np.random.default_rng(length).permutation(-(-length // dealing.round) + 3)
    on_rank = dealing.blocks(table.tolist(), block_size)
    for rank in range(dealing.ranks):
        at = positions(dealing.pieces(rank, range(length)))
        blocks, places = dealing.cells(at, table, block_size)
        expected = [divmod(i, block_size) for i in range(len(at))]
        assert blocks.tolist() == [on_rank[block] for block, _ in expected]
        assert places.tolist() == [place for _, place in expected]


def test_rounds_balance_the_work_of_a_causal_mask() -> None:
    dealing = Dealing(4, 16)
    shares = [dealing.pieces(rank, range(16 * 64)) for rank in range(4)]
    work = [int((positions(pieces) + 1).sum()) for pieces in shares]
    assert max(work) < 1.01 * min(work)
    assert {count(pieces) for pieces in shares} == {16 * 16}


@pytest.mark.parametrize(("ranks", "grain"), [(0, 4), (2, 0)])
def test_dealing_to_nobody_or_of_nothing_is_refused(ranks: int, grain: int) -> None:
    with pytest.raises(RingError, match="at least one rank and token"):
        Dealing(ranks, grain)
