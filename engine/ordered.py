"""Sums over ranks whose terms are added in the order of the ranks, whatever row they are in.

An all-reduce may add a number's terms in an order that follows from where in the message it is;
for two ranks there is one order only. Here every rank gets all terms, so that (W - 1) times as much
is sent as by a single rank's result: for `deterministic` instances alone.
"""

from collections.abc import Sequence

from torch import Tensor

from engine.parallel import Collectives, ExpertGroup, Layout


class OrderedCollectives:
    """Collectives of the tp ranks of a layout; see Collectives."""

    def __init__(self, ranks: Collectives, layout: Layout) -> None:
        self._ranks = ranks
        self._layout = layout

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Collectives."""
        size, width = self._layout.tp, x.shape[-1]
        first, *more = self._ranks.all_gather(x.contiguous(), size * width).chunk(size, -1)
        total = first.contiguous()
        for part in more:
            total += part
        return total

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        """See Collectives."""
        return self._ranks.all_gather(x, width)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See Collectives."""
        return self.all_reduce(x)[self._layout.ragged_part(len(x))]

    def all_gather_rows(self, x: Tensor, rows: int) -> Tensor:
        """See Collectives."""
        return self._ranks.all_gather_rows(x, rows)


class OrderedExperts:
    """The ranks that share experts; see ExpertGroup."""

    def __init__(self, group: ExpertGroup) -> None:
        self._group = group
        self.size, self.rank = group.size, group.rank

    def all_to_all(
        self, x: Tensor, give: Sequence[int] | None = None, take: Sequence[int] | None = None
    ) -> Tensor:
        """See ExpertGroup."""
        return self._group.all_to_all(x, give, take)

    def all_gather(self, x: Tensor) -> Tensor:
        """See ExpertGroup."""
        return self._group.all_gather(x)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See ExpertGroup."""
        first, *more = self._group.all_gather(x).chunk(self.size)
        total = first.contiguous()
        for part in more:
            total += part
        return total

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See ExpertGroup."""
        return self._group.reduce_scatter(x)
