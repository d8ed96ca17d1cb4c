"""Bringing rows from one cut of a sequence to another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ring import Pieces, RingError, SequenceShards, Wire, move, zigzag
from engine.ring.shards import meet, positions
from tests.unit.engine.ring.passes import scattered
from tests.unit.engine.ring.threads import LoopbackComm, on_ranks


def rows_of(pieces: Pieces) -> torch.Tensor:
    """Rows that say which token they are."""
    at = torch.from_numpy(positions(pieces))
    return torch.stack((at, -at), dim=1)[:, :, None].expand(-1, 2, 3).contiguous()


def moved(have: tuple[Pieces, ...], want: tuple[Pieces, ...]) -> int:
    """Move them, check every row, and return the bytes that all ranks sent."""

    def run(comm: LoopbackComm) -> int:
        wire = Wire(comm)
        found = move(wire, rows_of(have[comm.rank]), have, want)
        assert torch.equal(found, rows_of(want[comm.rank]))
        return wire.traffic.bytes_sent

    return sum(on_ranks(len(have), run))


@settings(deadline=None, max_examples=40)
@given(
    total=st.integers(0, 150),
    ranks=st.integers(1, 5),
    grain=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_scattered_tokens_come_to_where_the_layout_has_them(
    total: int, ranks: int, grain: int, seed: int
) -> None:
    have, want = scattered(total, ranks, seed), zigzag(range(total), ranks, grain)
    staying = sum(
        len(meet(a, b)) for old, new in zip(have, want, strict=True) for a in old for b in new
    )
    assert moved(have, want) == (total - staying) * 2 * 3 * 8


def test_two_evenly_cut_passes_come_to_where_the_layout_has_them() -> None:
    first = SequenceShards.balanced(45, ((), (), ()))
    second = SequenceShards.balanced(30, first.after())
    moved(second.after(), zigzag(range(75), 3, 4))


def test_rows_may_be_wanted_by_several_ranks_or_by_none() -> None:
    have = ((range(6),), (range(6, 10),))
    assert moved(have, ((range(2, 8),), (range(2, 8),))) == (2 + 4) * 2 * 3 * 8


def test_nothing_is_sent_where_all_lies_right() -> None:
    cut = zigzag(range(77), 3, 5)
    assert moved(cut, cut) == 0


@pytest.mark.parametrize(
    ("have", "want", "message"),
    [
        (((range(4),), ()), ((range(3, 5),), ()), "not each is had once"),
        (((range(4),), (range(4),)), ((range(4),), ()), "not each is had once"),
        (((range(4),),), ((range(4),), ()), "for 1 and 2 ranks, and there are 2"),
        (((range(5),), ()), ((), ()), "5 rows are had, found 4"),
    ],
)
def test_cuts_that_do_not_fit_are_refused_before_anything_is_sent(
    have: tuple[Pieces, ...], want: tuple[Pieces, ...], message: str
) -> None:
    wire = Wire(LoopbackComm(0, 2, {}))
    with pytest.raises(RingError, match=message):
        move(wire, torch.zeros(4), have, want)
    assert wire.traffic.bytes_sent == 0
