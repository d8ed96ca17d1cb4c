"""What every layer is, and where its tensors live."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from engine.dispatch import Dispatch, ExpertMap
from engine.kernels import ProductKernel, RowKernels, product_kernel, row_kernels
from engine.layers.stream import Stream, stream_of
from engine.parallel import Collectives, Layout
from engine.step_watch import StepWatch
from engine.weights import WeightSlot


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The dtype and device of a model's tensors, and how the model is split over ranks.

    With `whole_logits` each tp rank gets those of all tokens, else those of its own part.
    Without `dispatch` the experts' inner size is split like a dense MLP's. `expert_maps` are by
    layer; those of others are even, with `redundant_experts` more slots on each ep rank. With
    `deterministic` a token gets the same bits whatever else is in the pass.
    """

    dtype: torch.dtype
    device: torch.device
    layout: Layout
    ranks: Collectives
    whole_logits: bool = True
    dispatch: Dispatch | None = None
    expert_maps: Mapping[int, ExpertMap] = field(default_factory=dict)
    redundant_experts: int = 0
    watch: StepWatch = field(default_factory=StepWatch)
    deterministic: bool = False

    @property
    def stream(self) -> Stream:
        """How the residual stream lies on the ranks."""
        return stream_of(self.layout, self.ranks)

    @property
    def make_product(self) -> ProductKernel:
        """What makes products with weights."""
        return product_kernel(self.device, deterministic=self.deterministic)

    @property
    def rows(self) -> RowKernels:
        """What is done to rows between products."""
        return row_kernels(self.device, self.dtype, deterministic=self.deterministic)

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialised weight."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class Layer(Protocol):
    """Something with weights. The order of use: slots are filled, then `prepare`, then calls."""

    def slots(self) -> Iterator[WeightSlot]:
        """Yield the checkpoint tensors that this rank's part of the layer is made of."""
        ...

    def prepare(self) -> None:
        """Bring loaded weights into the form that is computed with."""
        ...
