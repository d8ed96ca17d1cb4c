"""Which rank has which tokens of a sequence in service, whatever its length. Pure arithmetic.

Runs of `grain` tokens are dealt one by one to the ranks, from one of them to the one before it and
back again, so that in each round of `ranks` grains every rank has one. A token's rank, and its
place there, follow from its position alone: a prompt may come in chunks and begin with what is
cached. Under a causal mask a round there and one back make equal work, like the chunks of a zigzag.

A block of the instance holds one round: on each rank it is the blocks of that rank's grain.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedError
from engine.parallel import Layout
from engine.ring.errors import RingError
from engine.ring.shards import Pieces, SequenceShards, joined, meet


@dataclass(frozen=True)
class Dealing:
    """Grains of `grain` tokens over `ranks`; raises RingError for less than one of either."""

    ranks: int
    grain: int

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.grain < 1:
            raise RingError(f"dealing needs at least one rank and token, found {self}")

    @property
    def round(self) -> int:
        """Tokens of one round."""
        return self.ranks * self.grain

    def pieces(self, rank: int, tokens: range, first: int = 0) -> Pieces:
        """Return what `rank` has of `tokens` of a sequence that begins at rank `first`."""
        place = (rank - first) % self.ranks
        return joined(meet(grain, tokens) for grain in self._grains(place, tokens))

    def shards(self, start: int, count: int, first: int = 0) -> SequenceShards:
        """Return where `count` new tokens after `start` cached ones are, and those.

        The sequence begins at rank `first`.
        """
        new, cached = range(start, start + count), range(start)
        return SequenceShards(
            new=tuple(self.pieces(rank, new, first) for rank in range(self.ranks)),
            cached=tuple(self.pieces(rank, cached, first) for rank in range(self.ranks)),
        )

    def cells(
        self, positions: NDArray[np.int64], table: NDArray[np.int64], block_size: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each token's block on its rank, and its place there, from the instance's blocks.

        The grain is a multiple of `block_size`; all positions are of one rank.
        """
        in_grain = positions % self.grain
        each = self.grain // block_size
        return table[positions // self.round] * each + in_grain // block_size, in_grain % block_size

    def blocks(self, table: Iterable[int], block_size: int) -> Sequence[int]:
        """Return the blocks on any one rank that a sequence's blocks of the instance stand for."""
        each = self.grain // block_size
        return [block * each + i for block in table for i in range(each)]

    def _grains(self, place: int, tokens: range) -> Iterator[range]:
        for number in range(tokens.start // self.round, -(-tokens.stop // self.round)):
            turn = self.ranks - 1 - place if number % 2 else place
            begin = number * self.round + turn * self.grain
            yield range(begin, begin + self.grain)


def dealing_of(layout: Layout, block_size: int) -> Dealing:
    """Return how a layout deals tokens to its cp ranks; to a single one, block by block.

    Raises UnsupportedError where it leaves the grain open, or has one that is not whole blocks.
    """
    if layout.grain_is_open:
        raise UnsupportedError(f"cp={layout.cp} needs a grain of whole blocks, found none")
    grain = layout.cp_grain if layout.cp > 1 else block_size
    if grain % block_size:
        raise UnsupportedError(f"a grain of {grain} tokens is not whole blocks of {block_size}")
    return Dealing(layout.cp, grain)
