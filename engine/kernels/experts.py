"""The seam of a sparse layer's experts, and its form as a matrix product for each of them.

Legend: T tokens, D hidden size, E experts, K experts of a token, P = T * K pairs, I inner size.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.rows import Routes, RowKernels

Put = Callable[[int], None]  # gives the expert of a number the staged weights


class Experts(Protocol):
    """Some experts with their weights."""

    def __call__(self, x_TD: Tensor, routes: Routes) -> Tensor:
        """Return weighted sums [T, D] in fp32, each in the order of its token's choices.

        T is not zero.
        """
        ...

    def pairs(self, x_TD: Tensor, tokens_P: Tensor, experts_P: Tensor) -> Tensor:
        """Return what each pair's expert makes of its token, [P, D], neither weighted nor added.

        Pairs are in any order; zeros where the expert is -1, none of these. A pair's result
        depends on its expert's pairs at most, never on other experts'.
        """
        ...

    def stage(self, gate_up: Tensor, down: Tensor) -> Put:
        """Bring an expert's weights, [2I, D] and [D, I], into their form; return what puts them in.

        From any thread: what takes long is done here. To put them is the calling thread's, between
        two calls, and replaces an expert's weights by a copy at most.
        """
        ...


# Constant weights, gate above up, [E, 2I, D] and [E, D, I].
ExpertsKernel = Callable[[Tensor, Tensor], Experts]

# Small experts and few tokens: one batched product over all experts costs less than the calls
# for each chosen one. Gathering the chosen experts' weights measured slower than either, and
# torch's grouped product no faster than the calls.
_ALL_EXPERTS_WEIGHTS = 1 << 21
_ALL_EXPERTS_PAIRS = 256


class ProductExperts:
    """Sends each expert's tokens through its own products."""

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        make_product: Callable[[Tensor], Callable[[Tensor], Tensor]],
        rows: RowKernels,
    ) -> None:
        self._rows = rows
        self._make_product = make_product
        self._gate_up_products = [make_product(weight) for weight in gate_up]
        self._down_products = [make_product(weight) for weight in down]
        small = gate_up.numel() + down.numel() <= _ALL_EXPERTS_WEIGHTS
        self._together = (gate_up, down) if small else None

    def __call__(self, x_TD: Tensor, routes: Routes) -> Tensor:
        """See `Experts`."""
        experts = len(self._down_products)
        if self._together and len(x_TD) * experts <= _ALL_EXPERTS_PAIRS:
            return self._through_all(x_TD, routes, *self._together)
        pairs = routes.pairs
        y_PD = torch.cat(list(self._through_chosen(x_TD, pairs.tokens_P, pairs.loads)))
        # One choice after another: torch multiplies bf16 by fp32 an order slower than two fp32.
        choices = zip(pairs.place_TK.unbind(1), routes.weights_TK.unbind(1), strict=True)
        place_T, weight_T = next(choices)
        sum_TD = y_PD.index_select(0, place_T).float().mul_(weight_T[:, None])
        for place_T, weight_T in choices:
            sum_TD.addcmul_(y_PD.index_select(0, place_T).float(), weight_T[:, None])
        return sum_TD

    def pairs(self, x_TD: Tensor, tokens_P: Tensor, experts_P: Tensor) -> Tensor:
        """See `Experts`."""
        order_P, loads = by_expert(experts_P, len(self._down_products))
        y_PD = x_TD.new_zeros(len(tokens_P), x_TD.shape[1])
        if len(order_P):
            sorted_PD = torch.cat(list(self._through_chosen(x_TD, tokens_P[order_P], loads)))
            y_PD.index_copy_(0, order_P, sorted_PD)
        return y_PD

    def stage(self, gate_up: Tensor, down: Tensor) -> Put:
        """See `Experts`."""
        products = self._make_product(gate_up), self._make_product(down)

        def put(expert: int) -> None:
            self._gate_up_products[expert], self._down_products[expert] = products
            if self._together:
                for stacked, weight in zip(self._together, (gate_up, down), strict=True):
                    stacked[expert] = weight

        return put

    def _through_chosen(self, x_TD: Tensor, tokens_P: Tensor, loads: list[int]) -> Iterator[Tensor]:
        slices = torch.split(tokens_P, loads)
        experts = zip(slices, self._gate_up_products, self._down_products, strict=True)
        for tokens, gate_up, down in experts:
            if len(tokens):
                yield down(self._rows.gated(gate_up(x_TD.index_select(0, tokens))))

    def _through_all(self, x_TD: Tensor, routes: Routes, gate_up: Tensor, down: Tensor) -> Tensor:
        x_ETD = x_TD.expand(len(gate_up), -1, -1)
        inner_ETI = self._rows.gated(torch.bmm(x_ETD, gate_up.transpose(1, 2)))
        y_ETD = torch.bmm(inner_ETI, down.transpose(1, 2))
        tokens_T1 = torch.arange(len(x_TD), device=x_TD.device)[:, None]
        y_TKD = y_ETD[routes.experts_TK, tokens_T1].float()
        return y_TKD.mul_(routes.weights_TK[..., None]).sum(1)


def by_expert(experts_P: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Return the order that sorts pairs by expert, without those of -1, and each expert's pairs."""
    nobody, *loads = torch.bincount(experts_P + 1, minlength=experts + 1).tolist()
    return experts_P.argsort(stable=True)[nobody:], loads
