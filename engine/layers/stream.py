"""How the residual stream lies on the tensor-parallel ranks: whole on each, or by rows.

Owns the joining of what the ranks made of their parts of a matrix. By rows is Megatron's sequence
parallelism (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2): what an all-reduce does is
done by a reduce-scatter after one product and an all-gather before the next, and norms and
additions, which need no other row, are computed once instead of on every rank.

Legend: T rows of a pass, t this rank's rows of them, S wanted rows, D hidden size.
"""

from typing import Protocol

from torch import Tensor

from engine.parallel import Collectives, Layout


class Stream(Protocol):
    """Every rank calls the same, with as many rows."""

    def rows(self, total: int) -> int:
        """Return how many of a pass's rows this rank has."""
        ...

    def add_up(self, x_TD: Tensor) -> Tensor:
        """Return this rank's rows of the sum over the ranks; `x_TD` may be written over."""
        ...

    def whole(self, x_tD: Tensor, total: int) -> Tensor:
        """Return all `total` rows from each rank's."""
        ...

    def pick(self, x_tD: Tensor, total: int, wanted_S: Tensor) -> Tensor:
        """Return this rank's rows of the stream that only the wanted ones of `total` make up."""
        ...


class WholeStream:
    """Every rank has all rows; see Stream."""

    def __init__(self, ranks: Collectives) -> None:
        self.add_up = ranks.all_reduce

    def rows(self, total: int) -> int:
        """See Stream."""
        return total

    def whole(self, x_tD: Tensor, total: int) -> Tensor:
        """See Stream."""
        return x_tD

    def pick(self, x_tD: Tensor, total: int, wanted_S: Tensor) -> Tensor:
        """See Stream."""
        return x_tD[wanted_S]


class SplitStream:
    """Every rank has its part of the rows, the last ones maybe fewer; see Stream."""

    def __init__(self, ranks: Collectives, layout: Layout) -> None:
        self.add_up = ranks.reduce_scatter
        self._all_gather_rows = ranks.all_gather_rows
        self._layout = layout

    def rows(self, total: int) -> int:
        """See Stream."""
        part = self._layout.ragged_part(total)
        rows: int = part.stop - part.start
        return rows

    def whole(self, x_tD: Tensor, total: int) -> Tensor:
        """See Stream."""
        return self._all_gather_rows(x_tD, total)

    def pick(self, x_tD: Tensor, total: int, wanted_S: Tensor) -> Tensor:
        """See Stream."""
        return self.whole(x_tD, total)[wanted_S][self._layout.ragged_part(len(wanted_S))]


def stream_of(layout: Layout, ranks: Collectives) -> Stream:
    """Return how a layout's stream lies on its tp ranks."""
    if layout.sequence_parallel and layout.tp > 1:
        return SplitStream(ranks, layout)
    return WholeStream(ranks)
