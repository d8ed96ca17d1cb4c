"""A router and its experts: each token goes through the K experts with the highest scores.

Tensor parallelism splits every expert's inner size.

Legend: T tokens, D hidden size, E experts of this rank, K experts of a token, P = T * K pairs,
I inner size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.kernels import experts_kernel, row_kernels
from engine.kernels.experts import Experts
from engine.layers.layer import Placement
from engine.weights import WeightSlot


class SparseMLP:
    """The experts of one layer; `name` is its place in the checkpoint, "model.layers.0.mlp"."""

    def __init__(self, config: ModelConfig, name: str, placement: Placement) -> None:
        assert config.moe is not None
        self._name = name
        self._num_experts = config.moe.num_experts
        self._top_k = config.moe.top_k
        self._norm_topk_prob = config.moe.norm_topk_prob
        self._local = placement.layout.expert_part(self._num_experts)
        experts = self._local.stop - self._local.start
        hidden = config.hidden_size
        self._sizes = (hidden, config.moe.intermediate_size)
        self._inner = placement.layout.tensor_part(config.moe.intermediate_size)
        self._add_up = placement.stream.add_up
        inner = self._inner.stop - self._inner.start
        # The router is small and decides discretely: fp32 whatever the model's dtype.
        self._router_ED = torch.empty(self._num_experts, hidden, device=placement.device)
        self._make_experts = experts_kernel(placement.device)
        self._rows = row_kernels(placement.device, placement.dtype)
        self._loading: tuple[Tensor, Tensor] | None = (
            placement.empty(experts, 2 * inner, hidden),
            placement.empty(experts, hidden, inner),
        )
        self._experts: Experts

    def slots(self) -> Iterator[WeightSlot]:
        yield self._slot("gate", tuple(self._router_ED.shape), (), self._router_ED)
        assert self._loading is not None
        all_gate_up, all_down = self._loading
        hidden, whole = self._sizes
        inner, rows, columns = all_down.shape[2], (self._inner,), (slice(None), self._inner)
        for local, expert in enumerate(range(self._local.start, self._local.stop)):
            gate, up = all_gate_up[local, :inner], all_gate_up[local, inner:]
            name = f"experts.{expert}"
            yield self._slot(f"{name}.gate_proj", (whole, hidden), rows, gate)
            yield self._slot(f"{name}.up_proj", (whole, hidden), rows, up)
            yield self._slot(f"{name}.down_proj", (hidden, whole), columns, all_down[local])

    def _slot(
        self, name: str, shape: tuple[int, ...], part: tuple[slice, ...], target: Tensor
    ) -> WeightSlot:
        name = f"{self._name}.{name}.weight"
        return WeightSlot(name=name, shape=shape, part=part, target=target)

    def prepare(self) -> None:
        assert self._loading is not None
        self._experts = self._make_experts(*self._loading)
        self._loading = None  # the experts have what they need

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return the experts' weighted sum in fp32, each token's in the order of its choices."""
        if not len(x_TD):
            return self._add_up(torch.empty_like(x_TD, dtype=torch.float32))
        logits_TE = F.linear(x_TD.float(), self._router_ED)
        routes = self._rows.route(logits_TE, self._top_k, self._norm_topk_prob)
        return self._add_up(self._experts(x_TD, routes))
