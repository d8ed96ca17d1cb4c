"""Grouped-query attention with normalised queries and keys, over the paged cache.

Legend: T tokens, D hidden size, N query heads and G KV heads of this rank, M = N + G, X = 2G,
H head size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kvcache import KVCache
from engine.layers.layer import Placement
from engine.layers.linear import ColumnLinear, RowLinear
from engine.layers.rotary import Angles
from engine.weights import WeightSlot

Attend = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What the layers share in one forward pass.

    `attend(l, qkv)` is causal attention of the new tokens, [T, N + X, H] to [T, N * H], once their
    K and V are in layer l of the cache; `on_layer(l)` is told when they are.
    """

    token_ids_T: Tensor
    slot_mapping_TX: Tensor
    angles: Angles
    cache: KVCache
    attend: Attend
    on_layer: Callable[[int], None] | None


class Attention:
    """One layer's attention; `name` is its place in the checkpoint, "model.layers.0.self_attn"."""

    def __init__(self, config: ModelConfig, layer: int, name: str, placement: Placement) -> None:
        heads = placement.layout.tensor_part(config.num_heads)
        kv_heads = placement.layout.kv_part(config.num_kv_heads)
        size = config.head_size
        q_rows, kv_rows = (slice(p.start * size, p.stop * size) for p in (heads, kv_heads))
        self._layer = layer
        self._name = name
        self._num_heads = heads.stop - heads.start
        self._num_qk_heads = self._num_heads + kv_heads.stop - kv_heads.start
        self._num_all_heads = self._num_qk_heads + kv_heads.stop - kv_heads.start
        self._head_size = size
        self._qkv = ColumnLinear(
            [
                (f"{name}.q_proj", config.num_heads * size, q_rows),
                (f"{name}.k_proj", config.num_kv_heads * size, kv_rows),
                (f"{name}.v_proj", config.num_kv_heads * size, kv_rows),
            ],
            config.hidden_size,
            placement,
        )
        self._out = RowLinear(
            f"{name}.o_proj", config.num_heads * size, config.hidden_size, placement
        )
        # The two norms as one: each head's row is the weight that belongs to it.
        self._norm_MH = torch.empty(self._num_qk_heads, size, device=placement.device)
        self._floor = torch.tensor((size * config.rms_norm_eps) ** 0.5, device=placement.device)

    def slots(self) -> Iterator[WeightSlot]:
        yield from self._qkv.slots()
        yield from self._out.slots()
        for norm, row in (("q_norm", 0), ("k_norm", self._num_heads)):
            yield WeightSlot(
                name=f"{self._name}.{norm}.weight",
                shape=(self._head_size,),
                part=(),
                target=self._norm_MH[row],
            )

    def prepare(self) -> None:
        self._qkv.prepare()
        self._out.prepare()
        self._norm_MH[: self._num_heads] = self._norm_MH[0].clone()
        self._norm_MH[self._num_heads :] = self._norm_MH[self._num_heads].clone()
        # See engine.layers.norm for the factor. Queries also get attention's scale, its inverse,
        # here: in fp32, and for free.
        self._norm_MH[self._num_heads :] *= self._head_size**0.5

    def __call__(self, x_TD: Tensor, shared: Pass) -> Tensor:
        qkv_TNH = self._qkv(x_TD).view(len(x_TD), self._num_all_heads, self._head_size)
        self._normalise_and_rotate(qkv_TNH[:, : self._num_qk_heads], shared.angles)
        shared.cache.insert(self._layer, shared.slot_mapping_TX, qkv_TNH[:, self._num_heads :])
        if shared.on_layer is not None:
            shared.on_layer(self._layer)
        return self._out(shared.attend(self._layer, qkv_TNH))

    def _normalise_and_rotate(self, qk_TMH: Tensor, angles: Angles) -> None:
        """Do both in place, in fp32 and with one rounding; see engine.layers.norm."""
        x_TMH = qk_TMH.to(torch.float32, copy=True)
        length_TM1 = torch.linalg.vector_norm(x_TMH, dim=-1, keepdim=True)
        x_TMH.div_(length_TM1.hypot_(self._floor)).mul_(self._norm_MH)
        qk_TMH.copy_(angles.rotate(x_TMH))
