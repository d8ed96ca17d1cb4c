"""Root-mean-square normalisation. Source: Zhang and Sennrich 2019, arXiv 1910.07467.

x / sqrt(mean(x^2) + eps) is written with the vector norm as sqrt(D) * x / hypot(|x|,
sqrt(D * eps)), and sqrt(D) goes into the weight: three small operations fewer than the
composite torch.rms_norm on a CPU. Weights and arithmetic are fp32 whatever the model's dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.kernels.rows import NormWeight
from engine.layers.layer import Placement
from engine.weights import WeightSlot


class RMSNorm:
    """Normalises fp32 rows of D elements and returns them in the model's dtype."""

    def __init__(self, name: str, size: int, eps: float, placement: Placement) -> None:
        self._name = name
        self._rows = placement.rows
        self.norm = NormWeight(torch.empty(size, device=placement.device), eps)

    def slots(self) -> Iterator[WeightSlot]:
        weight_D = self.norm.weight
        yield WeightSlot(
            name=f"{self._name}.weight", shape=tuple(weight_D.shape), part=(), target=weight_D
        )

    def prepare(self) -> None:
        weight_D = self.norm.weight
        weight_D *= weight_D.shape[0] ** 0.5

    def __call__(self, x_TD: Tensor, more_TD: Tensor | None) -> Tensor:
        """Add `more_TD` to the residual stream `x_TD` in place, and return its norm."""
        return self._rows.norm(x_TD, more_TD, self.norm)
