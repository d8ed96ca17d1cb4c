"""The seam of the ways to an expert, and what they have in common.

Every rank of the group calls a dispatcher for the same layers in the same order, with tokens of its
own dp rank. The tp ranks of a dp rank have the same tokens: each brings its part of them on their
way (`Layout.ragged_part`), and afterwards they are gathered.

Legend: T tokens of a dp rank, t this rank's part of them, K experts of a token, D hidden size,
J ranks that have a part of an expert's inner size, P pairs of a token and its choice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.parallel import Collectives, ExpertGroup, Layout

# Outputs that are in memory in fp32 at a time: 16 MiB of them.
_SLAB_ELEMENTS = 1 << 22

# Rows [R, D], tokens [P] among them and their slots [P] on this rank, -1 for none, to what the
# experts there make of them, [P, D], in the order of the pairs; zeros where there is none.
PairExperts = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Where each token's experts are, in the order of its choices, and their fp32 weights.

    Slots are numbered through the ep ranks, `width` of each: see ExpertMap.
    """

    slots_TK: Tensor
    weights_TK: Tensor
    width: int


class Router(Protocol):
    """Chooses tokens' experts."""

    def __call__(self, x_TD: Tensor, first: int, counted: slice = slice(None)) -> Choices:
        """Return the choices of rows whose first is the dp rank's row `first`.

        Those `counted` enter the experts' loads: every token on one rank.
        """
        ...


class Dispatcher(Protocol):
    """A way for tokens to their experts and back."""

    def __call__(
        self, x_TD: Tensor, router: Router, experts: PairExperts, most_rows: int
    ) -> Tensor:
        """Return the weighted sums [T, D] in fp32 of this dp rank's tokens.

        No dp rank has more than `most_rows` of them; a rank may have none.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Members:
    """The ranks that share the experts, and of them those of tp."""

    layout: Layout
    group: ExpertGroup
    tp: Collectives

    def own(self, rows: int) -> slice:
        """Return this rank's part of its dp rank's rows."""
        return self.layout.ragged_part(rows)

    def part(self, most_rows: int) -> int:
        """Return how many rows a rank's part has at most."""
        return -(-most_rows // self.layout.tp)

    def local(self, slots: Tensor, width: int) -> Tensor:
        """Return slots as this rank numbers its own, and -1 for those of others."""
        found = slots - self.layout.ep_rank * width
        return found.masked_fill_((found < 0) | (found >= width), -1)


def weighted_sum(y_XD: Tensor, place_JTK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return [T, D] in fp32: the J parts of each choice added up, the choices in their order.

    `place_JTK` are the parts' rows in `y_XD`. The order, and so every bit, is independent of where
    the experts are. A product and a sum are rounded apart, so that no compiler makes it depend on
    a row's place.
    """
    tokens, top_k = weights_TK.shape
    sum_TD = y_XD.new_empty(tokens, y_XD.shape[1], dtype=torch.float32)
    slab = max(1, _SLAB_ELEMENTS // (top_k * y_XD.shape[1]))
    for begin in range(0, tokens, slab):
        rows = slice(begin, begin + slab)
        first, *more = place_JTK[:, rows].unbind(0)
        y_TKD = y_XD[first].to(torch.float32)
        for place_TK in more:
            y_TKD += y_XD[place_TK]
        y_TKD *= weights_TK[rows, :, None]
        sum_TD[rows] = y_TKD[:, 0]
        for k in range(1, top_k):
            sum_TD[rows] += y_TKD[:, k]
    return sum_TD
