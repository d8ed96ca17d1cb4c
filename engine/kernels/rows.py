"""The seam of what is done to rows between matrix products, and its form in torch's operators.

Owns no memory and no weights. Every form rounds to the model's dtype once where it can, computes
in fp32, and gives a row the same result whatever other rows there are.

Legend: T tokens, D hidden size, M query and key heads, X = 2G cells of a token, H head size,
E experts, K experts of a token, P = T * K pairs, I inner size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class NormWeight:
    """The factors of a norm, for rows of `weight`'s last dimension; see engine.layers.norm.

    `weight` is fp32 and filled in place later; sqrt(size) must be part of it. Without an `eps` rows
    are not normalised, only multiplied: whatever their length, it counts as one. Compiled code
    knows that by a `floor_squared` below zero.
    """

    def __init__(self, weight: Tensor, eps: float | None) -> None:
        self.weight = weight
        self.normalises = eps is not None
        self.floor_squared = -1.0 if eps is None else weight.shape[-1] * eps
        self.floor = torch.tensor(max(self.floor_squared, 0) ** 0.5, device=weight.device)


@dataclass(frozen=True, kw_only=True)
class SortedPairs:
    """Pairs of a token and its choice, sorted by expert.

    `tokens_P` are the pairs' tokens, of which the first `loads[0]` are for expert 0 and so on;
    `place_TK` says where a token's k-th choice is among them.
    """

    tokens_P: Tensor
    place_TK: Tensor
    loads: list[int]


class Routes:
    """Which of `num_experts` experts see which tokens, and with which weights, both [T, K]."""

    def __init__(
        self,
        weights_TK: Tensor,
        experts_TK: Tensor,
        num_experts: int,
        pairs: SortedPairs | None = None,
    ) -> None:
        """`pairs` where they are known: else they are sorted by whoever asks for them first."""
        self.weights_TK = weights_TK
        self.experts_TK = experts_TK
        self._num_experts = num_experts
        self._pairs = pairs

    @property
    def pairs(self) -> SortedPairs:
        """The pairs by expert. How many an expert has is asked of the device, which takes time."""
        if self._pairs is None:
            self._pairs = self._sorted()
        return self._pairs

    def _sorted(self) -> SortedPairs:
        experts_P, top_k = self.experts_TK.flatten(), self.experts_TK.shape[1]
        order_P = experts_P.argsort(stable=True)
        place_P = torch.empty_like(order_P)
        place_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        return SortedPairs(
            tokens_P=order_P // top_k,
            place_TK=place_P.view(self.experts_TK.shape),
            loads=experts_P.bincount(minlength=self._num_experts).tolist(),
        )


class RowKernels(Protocol):
    """What is done to rows; of tensors that the device and dtype they were asked for fit."""

    def norm(self, x_TD: Tensor, more_TD: Tensor | None, norm: NormWeight) -> Tensor:
        """Add `more_TD`, of any dtype, to fp32 rows in place; return their norm."""
        ...

    def norm_rotate(
        self, x_TMH: Tensor, norm: NormWeight, cos_T1H: Tensor, sin_T1H: Tensor
    ) -> None:
        """Normalise heads, where the norm does, and turn them by their token's angle, in place.

        Heads may be a part of wider rows. `sin_T1H` is negative in its first half.
        """
        ...

    def insert(self, cells: Tensor, slots_TX: Tensor, x_TXH: Tensor) -> None:
        """Write heads to the rows [.., H] that slots name; raises IndexError beyond the last."""
        ...

    def gated(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up of gate and up side by side in the last dimension."""
        ...

    def route(self, logits_TE: Tensor, top_k: int, normalise: bool) -> Routes:
        """Choose the experts with the highest softmax of fp32 scores, which may be overwritten.

        The weights are those of the softmax; with `normalise` a token's sum to one.
        """
        ...

    def choose(self, logits_TE: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
        """Return only the weights [T, K] and the experts [T, K] that `route` would choose.

        Waits for nothing on the device.
        """
        ...


@dataclass(frozen=True)
class RowFunctions:
    """What torch does to fp32 scores where more than a softmax is asked for; see Gate.

    Attributes:
        sigmoid: Of each element.
        add_up: The last dimension.
    """

    sigmoid: Callable[[Tensor], Tensor]
    add_up: Callable[[Tensor], Tensor]


USUAL = RowFunctions(torch.sigmoid, lambda x: x.sum(-1))


class TorchRows:
    """What every device can do, in any dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def norm(self, x_TD: Tensor, more_TD: Tensor | None, norm: NormWeight) -> Tensor:
        """See `RowKernels`."""
        if more_TD is not None:
            x_TD += more_TD
        length_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        return x_TD.div(length_T1.hypot_(norm.floor)).mul_(norm.weight).to(self._dtype)

    def norm_rotate(
        self, x_TMH: Tensor, norm: NormWeight, cos_T1H: Tensor, sin_T1H: Tensor
    ) -> None:
        """See `RowKernels`."""
        fp32_TMH = x_TMH.to(torch.float32, copy=True)
        if norm.normalises:
            length_TM1 = torch.linalg.vector_norm(fp32_TMH, dim=-1, keepdim=True)
            fp32_TMH.div_(length_TM1.hypot_(norm.floor))
        fp32_TMH.mul_(norm.weight)
        swapped_TMH = fp32_TMH.roll(fp32_TMH.shape[-1] // 2, dims=-1)
        x_TMH.copy_(torch.addcmul(fp32_TMH * cos_T1H, swapped_TMH, sin_T1H))

    def insert(self, cells: Tensor, slots_TX: Tensor, x_TXH: Tensor) -> None:
        """See `RowKernels`."""
        cells.index_put_((slots_TX,), x_TXH)

    def gated(self, gate_up: Tensor) -> Tensor:
        """See `RowKernels`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def route(self, logits_TE: Tensor, top_k: int, normalise: bool) -> Routes:
        """See `RowKernels`."""
        weights_TK, experts_TK = self.choose(logits_TE, top_k, normalise)
        return Routes(weights_TK, experts_TK, logits_TE.shape[1])

    def choose(self, logits_TE: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
        """See `RowKernels`."""
        weights_TK, experts_TK = logits_TE.softmax(-1).topk(top_k, dim=-1)
        if normalise:
            weights_TK /= weights_TK.sum(-1, keepdim=True)
        return weights_TK, experts_TK
