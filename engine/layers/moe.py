"""A router and its experts: each token goes through the K experts with the highest scores.

Tensor parallelism splits every expert's inner size.

Legend: T tokens, D hidden size, E experts of this rank, K experts of a token, P = T * K pairs,
I inner size.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.kernels import Product, product_kernel
from engine.layers.layer import Placement
from engine.layers.mlp import gated
from engine.weights import WeightSlot

# Small experts and few tokens: one batched product over all experts costs less than the calls
# for each chosen one. Gathering the chosen experts' weights measured slower than either, and
# torch's grouped product no faster than the calls.
_ALL_EXPERTS_WEIGHTS = 1 << 21
_ALL_EXPERTS_PAIRS = 256


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
        self._make_product = product_kernel(placement.device)
        self._gate_up = placement.empty(experts, 2 * inner, hidden)
        self._down = placement.empty(experts, hidden, inner)
        self._gate_up_products: list[Product]
        self._down_products: list[Product]
        self._small = self._gate_up.numel() + self._down.numel() <= _ALL_EXPERTS_WEIGHTS

    def slots(self) -> Iterator[WeightSlot]:
        yield self._slot("gate", tuple(self._router_ED.shape), (), self._router_ED)
        hidden, whole = self._sizes
        inner, rows, columns = self._down.shape[2], (self._inner,), (slice(None), self._inner)
        for local, expert in enumerate(range(self._local.start, self._local.stop)):
            gate, up = self._gate_up[local, :inner], self._gate_up[local, inner:]
            name = f"experts.{expert}"
            yield self._slot(f"{name}.gate_proj", (whole, hidden), rows, gate)
            yield self._slot(f"{name}.up_proj", (whole, hidden), rows, up)
            yield self._slot(f"{name}.down_proj", (hidden, whole), columns, self._down[local])

    def _slot(
        self, name: str, shape: tuple[int, ...], part: tuple[slice, ...], target: Tensor
    ) -> WeightSlot:
        name = f"{self._name}.{name}.weight"
        return WeightSlot(name=name, shape=shape, part=part, target=target)

    def prepare(self) -> None:
        self._gate_up_products = [self._make_product(weight) for weight in self._gate_up]
        self._down_products = [self._make_product(weight) for weight in self._down]
        if not self._small:
            del self._gate_up, self._down  # the products have what they need

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return the experts' weighted sum in fp32."""
        weights_TK, experts_TK = self._route(x_TD)
        if self._small and len(x_TD) * self._num_experts <= _ALL_EXPERTS_PAIRS:
            y_TKD = self._through_all(x_TD, experts_TK)
        else:
            y_TKD = self._through_chosen(x_TD, experts_TK)
        # Always in the order of the router's choice, whatever else is in the batch.
        return self._add_up((y_TKD * weights_TK[..., None]).sum(1))

    def _route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        probs_TE = F.linear(x_TD.float(), self._router_ED).softmax(-1)
        weights_TK, experts_TK = probs_TE.topk(self._top_k, dim=-1)
        if self._norm_topk_prob:
            weights_TK /= weights_TK.sum(-1, keepdim=True)
        return weights_TK, experts_TK

    def _through_all(self, x_TD: Tensor, experts_TK: Tensor) -> Tensor:
        x_ETD = x_TD.expand(self._gate_up.shape[0], -1, -1)
        inner_ETI = gated(torch.bmm(x_ETD, self._gate_up.transpose(1, 2)))
        y_ETD = torch.bmm(inner_ETI, self._down.transpose(1, 2))
        tokens_T1 = torch.arange(len(x_TD), device=x_TD.device)[:, None]
        return y_ETD[experts_TK, tokens_T1]

    def _through_chosen(self, x_TD: Tensor, experts_TK: Tensor) -> Tensor:
        """Sort the pairs by expert, and run each expert on its slice of them."""
        experts_P = experts_TK.flatten()
        order_P = experts_P.argsort(stable=True)
        loads = experts_P.bincount(minlength=self._num_experts).tolist()
        x_PD = x_TD.index_select(0, order_P // self._top_k)
        inner_PI = _grouped(x_PD, self._gate_up_products, loads)
        y_PD = _grouped(gated(inner_PI), self._down_products, loads)
        place_P = torch.empty_like(order_P)
        place_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        return y_PD.index_select(0, place_P).view(*experts_TK.shape, y_PD.shape[1])


def _grouped(x_PI: Tensor, products: Sequence[Product], loads: list[int]) -> Tensor:
    """Send consecutive slices of rows, `loads` long, each through its own product."""
    if not len(x_PI):
        return products[0](x_PI)
    slices = zip(torch.split(x_PI, loads), products, strict=True)
    return torch.cat([product(x) for x, product in slices if len(x)])
