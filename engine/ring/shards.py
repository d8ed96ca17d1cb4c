"""Which rank has which tokens of a pass. Pure; owns no tensors and no processes.

Tokens are named by their position in the sequence. What a rank has of a sequence are `Pieces`:
ranges, ascending, none empty, none touching. The rows of a rank's tensors are in their order:
sequence by sequence, position by position.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engine.ring.errors import RingError

Pieces = tuple[range, ...]


def zigzag(tokens: range, ranks: int, grain: int = 1) -> tuple[Pieces, ...]:
    """Return each rank's share of `tokens`: chunks i and 2 * ranks - 1 - i for rank i.

    Under a causal mask an early (cheap) and a late (dear) chunk make equal work. Chunks are cut at
    multiples of `grain`, counted from the first token; the last ones may be short or empty. From
    token 0 on this is the cut that the KV transfer's zigzag layout makes. Raises RingError for
    fewer than one rank or token in a grain.
    """
    if ranks < 1 or grain < 1:
        raise RingError(f"zigzag needs at least one rank and grain, found {ranks=} {grain=}")
    size = -(-len(tokens) // (2 * ranks * grain)) * grain
    chunks = [tokens[i * size : (i + 1) * size] for i in range(2 * ranks)]
    return tuple(joined((chunks[i], chunks[-1 - i])) for i in range(ranks))


def within(pieces: Pieces, tokens: range) -> Pieces:
    """Return the parts of `pieces` that are in `tokens`."""
    return tuple(part for piece in pieces if (part := meet(piece, tokens)))


def meet(a: range, b: range) -> range:
    """Return the common part of two ranges; an empty one where there is none."""
    begin = max(a.start, b.start)
    return range(begin, max(begin, min(a.stop, b.stop)))


def positions(pieces: Iterable[range]) -> NDArray[np.int64]:
    """Return all positions in the pieces, in their order."""
    parts = [np.arange(piece.start, piece.stop, dtype=np.int64) for piece in pieces]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def count(pieces: Iterable[range]) -> int:
    """Return how many tokens the pieces have."""
    return sum(map(len, pieces))


def joined(pieces: Iterable[range]) -> Pieces:
    """Return pieces without empty ones, and without cuts where one goes on with the next."""
    joined: list[range] = []
    for piece in pieces:
        if joined and piece and joined[-1].stop == piece.start:
            joined[-1] = range(joined[-1].start, piece.stop)
        elif piece:
            joined.append(piece)
    return tuple(joined)


@dataclass(frozen=True)
class SequenceShards:
    """One sequence of a pass, by rank: the new tokens' pieces, and those that are cached.

    The new tokens follow the cached ones, which lie as some earlier cut has left them. A token's
    key and value are where it was new. Raises RingError where the pieces are not every token once.
    """

    new: tuple[Pieces, ...]
    cached: tuple[Pieces, ...]

    def __post_init__(self) -> None:
        if not self.new or len(self.new) != len(self.cached):
            raise RingError(
                f"new tokens are on {len(self.new)} ranks and cached ones on {len(self.cached)}; "
                f"they need the same ranks, at least one"
            )
        _check_cover(self.cached, range(self.start), "cached")
        _check_cover(self.new, range(self.start, self.end), "new")

    @classmethod
    def balanced(cls, count: int, cached: tuple[Pieces, ...], grain: int = 1) -> "SequenceShards":
        """Cut `count` new tokens evenly for themselves, wherever the cached ones lie."""
        start = sum(map(_count, cached))
        return cls(new=zigzag(range(start, start + count), len(cached), grain), cached=cached)

    @classmethod
    def of_layout(
        cls, start: int, count: int, *, total: int, ranks: int, grain: int
    ) -> "SequenceShards":
        """Put `count` tokens from `start` on, and those before, where the transfer's layout does.

        `total` are all the tokens that the sequence will have when it is transferred, `grain` the
        layout's. A short chunk of a long sequence may lie on one rank alone.
        """
        if not 0 <= start <= start + count <= total:
            raise RingError(f"{count} tokens from {start} on are not in a sequence of {total}")
        shares = zigzag(range(total), ranks, grain)
        return cls(
            new=tuple(within(share, range(start, start + count)) for share in shares),
            cached=tuple(within(share, range(start)) for share in shares),
        )

    @property
    def ranks(self) -> int:
        """Over how many ranks the sequence is spread."""
        return len(self.new)

    @cached_property
    def start(self) -> int:
        """How many tokens are cached; the position of the first new one."""
        return sum(map(_count, self.cached))

    @cached_property
    def end(self) -> int:
        """How many tokens there are after the pass."""
        return self.start + sum(map(_count, self.new))

    def after(self) -> tuple[Pieces, ...]:
        """Return where all tokens lie after the pass: `cached` of the next one."""
        return tuple(joined(old + new) for old, new in zip(self.cached, self.new, strict=True))

    def keys(self, rank: int, window: int | None = None) -> Pieces:
        """Return what `rank` has of the keys that any new token may look at."""
        if self.start == self.end:
            return ()
        first = 0 if window is None else max(0, self.start - window + 1)
        return within(self.cached[rank], range(first, self.start)) + self.new[rank]

    def token_order(self) -> NDArray[np.int64]:
        """Return for each new token, by position, its row in the ranks' rows one after another.

        The inverse of the cut: `torch.cat(rows_of_each_rank)[token_order]` is in order again.
        """
        return np.argsort(np.concatenate([positions(pieces) for pieces in self.new]))

    def place_of(self, position: int) -> tuple[int, int]:
        """Return the rank of a new token, and its row among the rank's new tokens of the sequence.

        Raises RingError where the position is not new.
        """
        for rank, pieces in enumerate(self.new):
            row = 0
            for piece in pieces:
                if position in piece:
                    return rank, row + position - piece.start
                row += len(piece)
        raise RingError(f"token {position} is not among the new ones, {self.start} to {self.end}")


_count = count  # the name within classmethods that have an argument `count`


def _check_cover(by_rank: Sequence[Pieces], tokens: range, what: str) -> None:
    pieces = sorted((p for share in by_rank for p in share), key=lambda piece: piece.start)
    ends = [tokens.start, *(piece.stop for piece in pieces)]
    starts = [*(piece.start for piece in pieces), tokens.stop]
    ascending = all(a.stop <= b.start for share in by_rank for a, b in pairwise(share))
    if ends != starts or not ascending or not all(p and p.step == 1 for p in pieces):
        raise RingError(
            f"the {what} pieces must be tokens {tokens.start} to {tokens.stop} once each, "
            f"ascending on each rank; found {by_rank}"
        )


@dataclass(frozen=True)
class Part:
    """A sequence's share of a rank's rows: rows `begin` to `end` hold the tokens of `pieces`."""

    begin: int
    end: int
    pieces: Pieces

    @cached_property
    def at(self) -> NDArray[np.int64]:
        """The position of each row; made once for all layers."""
        return positions(self.pieces)


@dataclass(frozen=True)
class RingPlan:
    """One pass over all ranks, the same on each. `window`: a token sees itself and window - 1 more.

    Layers with different windows need a plan each. Raises RingError where sequences are spread
    over different numbers of ranks, or a window is empty.
    """

    sequences: tuple[SequenceShards, ...]
    window: int | None = None

    def __post_init__(self) -> None:
        found = sorted({sequence.ranks for sequence in self.sequences})
        if len(found) != 1:
            raise RingError(f"a pass needs sequences over the same number of ranks, found {found}")
        if self.window is not None and self.window < 1:
            raise RingError(f"a window has at least one token, found {self.window}")

    @property
    def ranks(self) -> int:
        """Over how many ranks the pass is spread."""
        return self.sequences[0].ranks

    @cached_property
    def queries(self) -> tuple[tuple[Part, ...], ...]:
        """By rank: the rows of its new tokens, a part for each sequence."""
        return tuple(
            _parts(sequence.new[rank] for sequence in self.sequences) for rank in range(self.ranks)
        )

    @cached_property
    def keys(self) -> tuple[tuple[Part, ...], ...]:
        """By rank: the rows of keys that take part, cached ones then new, for each sequence."""
        return tuple(
            _parts(sequence.keys(rank, self.window) for sequence in self.sequences)
            for rank in range(self.ranks)
        )

    @cached_property
    def query_rows(self) -> tuple[int, ...]:
        """By rank: how many new tokens it has."""
        return tuple(parts[-1].end for parts in self.queries)

    @cached_property
    def key_rows(self) -> tuple[int, ...]:
        """By rank: how many keys it has."""
        return tuple(parts[-1].end for parts in self.keys)

    def sees(self, query_rank: int, key_rank: int) -> bool:
        """Tell whether some new token of one rank may look at a key of another."""
        pairs = zip(self.queries[query_rank], self.keys[key_rank], strict=True)
        return any(
            queries.at[-1] >= keys.at[0]
            and (self.window is None or queries.at[0] - self.window < keys.at[-1])
            for queries, keys in pairs
            if queries.pieces and keys.pieces
        )

    @cached_property
    def key_hops(self) -> tuple[int, ...]:
        """By rank: how far its keys must travel, from rank to rank, for all who look at them."""
        return tuple(self._hops(rank, lambda to, own: self.sees(to, own)) for rank in self._all)

    @cached_property
    def query_hops(self) -> tuple[int, ...]:
        """By rank: how far its queries must travel to come by all that they look at."""
        return tuple(self._hops(rank, lambda to, own: self.sees(own, to)) for rank in self._all)

    @property
    def _all(self) -> range:
        return range(self.ranks)

    def _hops(self, own: int, wanted: Callable[[int, int], bool]) -> int:
        hops = range(self.ranks - 1, 0, -1)
        return next((hop for hop in hops if wanted((own + hop) % self.ranks, own)), 0)


def _parts(by_sequence: Iterable[Pieces]) -> tuple[Part, ...]:
    parts: list[Part] = []
    begin = 0
    for pieces in by_sequence:
        parts.append(Part(begin, begin + count(pieces), pieces))
        begin = parts[-1].end
    return tuple(parts)
