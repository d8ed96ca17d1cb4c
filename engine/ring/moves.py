"""Brings rows that lie by one cut of a sequence to where another cut has them.

What a pass has cut evenly for itself, or a shared prefix from a sequence of another length, lies
elsewhere than the transfer's layout says. Owns the exchange; the cuts are its caller's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.ring.comm import Wire
from engine.ring.errors import RingError
from engine.ring.shards import Pieces, count, meet


def move(wire: Wire, rows_L: Tensor, have: Sequence[Pieces], want: Sequence[Pieces]) -> Tensor:
    """Return this rank's rows of `want`, [L', ...], given its rows of `have`, [L, ...].

    `have` and `want` are by rank, and the same on all. Each token is had by one rank; it may be
    wanted by any number of them. Raises RingError where rows do not fit `have` or a wanted token
    is nowhere, before anything is sent, and CommError.
    """
    _check(wire, rows_L, have, want)
    [tag] = wire.tags(1)
    arriving = {
        source: rows_L.new_empty(count(common), *rows_L.shape[1:])
        for source in _others(wire)
        if (common := _common(want[wire.rank], have[source]))
    }
    pending = [wire.receive(into, source, tag) for source, into in arriving.items()]
    for to in _others(wire):
        if common := _common(have[wire.rank], want[to]):
            pending.append(wire.send(_rows(rows_L, have[wire.rank], common), to, tag))
    kept = _common(want[wire.rank], have[wire.rank])
    arriving[wire.rank] = _rows(rows_L, have[wire.rank], kept)
    for each in pending:
        each.wait()
    found = rows_L.new_empty(count(want[wire.rank]), *rows_L.shape[1:])
    for source, rows in arriving.items():
        begin = 0
        for piece in _common(want[wire.rank], have[source]):
            to = _first_row(want[wire.rank], piece)
            found[to : to + len(piece)] = rows[begin : begin + len(piece)]
            begin += len(piece)
    return found


def _others(wire: Wire) -> list[int]:
    return [rank for rank in range(wire.size) if rank != wire.rank]


def _common(a: Pieces, b: Pieces) -> Pieces:
    """Return what is in both, ascending: alike for whoever asks, with a and b in either order."""
    met = (meet(one, other) for one in a for other in b)
    return tuple(sorted((piece for piece in met if piece), key=lambda piece: piece.start))


def _rows(rows_L: Tensor, pieces: Pieces, wanted: Pieces) -> Tensor:
    """Return the rows of `wanted`, each within one of `pieces`, one after another."""
    firsts = [_first_row(pieces, piece) for piece in wanted]
    parts = [
        rows_L[first : first + len(piece)] for first, piece in zip(firsts, wanted, strict=True)
    ]
    return torch.cat(parts) if parts else rows_L[:0]


def _first_row(pieces: Pieces, wanted: range) -> int:
    """Return the row, in the rows of `pieces`, of the first token of `wanted`."""
    before = 0
    for piece in pieces:
        if wanted.start in piece:
            return before + wanted.start - piece.start
        before += len(piece)
    raise AssertionError(f"{wanted} is not in {pieces}")


def _check(wire: Wire, rows_L: Tensor, have: Sequence[Pieces], want: Sequence[Pieces]) -> None:
    if len(have) != wire.size or len(want) != wire.size:
        raise RingError(
            f"the cuts are for {len(have)} and {len(want)} ranks, and there are {wire.size}"
        )
    if len(rows_L) != count(have[wire.rank]):
        raise RingError(f"{count(have[wire.rank])} rows are had, found {len(rows_L)}")
    everywhere = tuple(piece for pieces in have for piece in pieces)
    for pieces in want:
        if count(_common(pieces, everywhere)) != count(pieces):
            raise RingError(f"of the wanted tokens {pieces}, not each is had once: {have}")
