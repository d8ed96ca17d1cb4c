"""Root-mean-square normalisation. Source: Zhang and Sennrich 2019, arXiv 1910.07467.

x / sqrt(mean(x^2) + eps) is written with the vector norm as sqrt(D) * x / hypot(|x|,
sqrt(D * eps)), and sqrt(D) goes into the weight: three small operations fewer than the
composite torch.rms_norm on a CPU. Weights and arithmetic are fp32 whatever the model's dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.layers.layer import Placement
from engine.weights import WeightSlot


class RMSNorm:
    """Normalises fp32 rows of D elements and returns them in the model's dtype."""

    def __init__(self, name: str, size: int, eps: float, placement: Placement) -> None:
        self._name = name
        self._dtype = placement.dtype
        self._floor = torch.tensor((size * eps) ** 0.5, device=placement.device)
        self.weight_D = torch.empty(size, device=placement.device)

    def slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot(
            name=f"{self._name}.weight",
            shape=tuple(self.weight_D.shape),
            part=(),
            target=self.weight_D,
        )

    def prepare(self) -> None:
        self.weight_D *= self.weight_D.shape[0] ** 0.5

    def __call__(self, x_TD: Tensor) -> Tensor:
        length_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        return x_TD.div(length_T1.hypot_(self._floor)).mul_(self.weight_D).to(self._dtype)
