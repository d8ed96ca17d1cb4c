"""Grouped-query attention over the paged cache, with normalised queries and keys or without.

Legend: T tokens, D hidden size, N query heads and G KV heads of this rank, M = N + G, X = 2G,
H head size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import PrefillSpan
from engine.config import ModelConfig
from engine.decode_rows import DecodeRows
from engine.kernels.latent_prompts import LatentWeights
from engine.kernels.rows import NormWeight
from engine.kernels.step import AttentionWeights
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
    K and V are in layer l of the cache; `on_layer(l)` is told when they are. `attend_last(l, q)`
    does the same for the wanted rows alone, of their queries, [S, N, H] to [S, N * H]; None where
    attention needs those of all tokens. `decode` are the pass's rows where all of them are of
    decoding sequences; else None. No dp rank has more than `most_rows` tokens. `meanwhile` may be
    called once where the interpreter only waits for the pass.

    `prompts` are spans of tokens that `attend` leaves out, for `attend_prompt(l, q, span, weights)`
    to attend with the keys and values that are made of latents.
    """

    token_ids_T: Tensor
    slot_mapping_TX: Tensor
    angles: Angles
    cache: KVCache
    attend: Attend
    attend_last: Attend | None
    decode: DecodeRows | None
    on_layer: Callable[[int], None] | None
    most_rows: int
    meanwhile: Callable[[], None] | None = None
    prompts: tuple[PrefillSpan, ...] = ()
    attend_prompt: Callable[[int, Tensor, PrefillSpan, LatentWeights], Tensor] | None = None


class Attention:
    """One layer's attention; `name` is its place in the checkpoint, "model.layers.0.self_attn".

    The last layer's queries are a product of their own: few of its rows are wanted.
    """

    def __init__(
        self, config: ModelConfig, layer: int, name: str, placement: Placement, *, is_last: bool
    ) -> None:
        heads = placement.layout.tensor_part(config.num_heads)
        kv_heads = placement.layout.kv_part(config.num_kv_heads)
        size = config.head_size
        q_rows, kv_rows = (slice(p.start * size, p.stop * size) for p in (heads, kv_heads))
        self._layer = layer
        self._name = name
        self._num_heads = heads.stop - heads.start
        self._num_kv_heads = kv_heads.stop - kv_heads.start
        self._head_size = size
        q = (f"{name}.q_proj", config.num_heads * size, q_rows)
        k, v = ((f"{name}.{each}_proj", config.num_kv_heads * size, kv_rows) for each in ("k", "v"))
        self._qkv = [
            ColumnLinear(outputs, config.hidden_size, placement, biased=config.qkv_bias)
            for outputs in ([[q], [k, v]] if is_last else [[q, k, v]])
        ]
        self._out = RowLinear(
            f"{name}.o_proj", config.num_heads * size, config.hidden_size, placement
        )
        # The two norms as one: each head's row is the weight that belongs to it. They are constants
        # in models that do not normalise.
        self._normalises = config.qk_norm
        eps = config.rms_norm_eps if config.qk_norm else None
        num_qk_heads = self._num_heads + self._num_kv_heads
        norm_MH = torch.empty(num_qk_heads, size, device=placement.device)
        self._qk_norm = NormWeight(norm_MH, eps)
        self._q_norm = NormWeight(norm_MH[: self._num_heads], eps)
        self._k_norm = NormWeight(norm_MH[self._num_heads :], eps)
        self._rows = placement.rows

    def slots(self) -> Iterator[WeightSlot]:
        for qkv in self._qkv:
            yield from qkv.slots()
        yield from self._out.slots()
        if not self._normalises:
            return
        for name, norm in (("q_norm", self._q_norm), ("k_norm", self._k_norm)):
            yield WeightSlot(
                name=f"{self._name}.{name}.weight",
                shape=(self._head_size,),
                part=(),
                target=norm.weight[0],
            )

    def prepare(self) -> None:
        for qkv in self._qkv:
            qkv.prepare()
        self._out.prepare()
        # Queries get attention's scale here too: in fp32, and for free.
        q_norm_NH, k_norm_GH = self._q_norm.weight, self._k_norm.weight
        if self._normalises:
            q_norm_NH[:], k_norm_GH[:] = q_norm_NH[0].clone(), k_norm_GH[0].clone()
            # See engine.layers.norm for the factor. Of queries it is the scale's inverse.
            k_norm_GH *= self._head_size**0.5
        else:
            q_norm_NH.fill_(self._head_size**-0.5)
            k_norm_GH.fill_(1)

    def weights(self) -> AttentionWeights:
        """Return what a step through all layers needs."""
        biases = [qkv.bias_O for qkv in self._qkv if qkv.bias_O is not None]
        return AttentionWeights(
            qkv=[qkv.product for qkv in self._qkv],
            bias=torch.cat(biases) if biases else None,
            qk_norm=self._qk_norm,
            out=self._out.product,
        )

    def __call__(self, x_TD: Tensor, shared: Pass, wanted_S: Tensor | None) -> Tensor:
        """Return attention's output, [T, D]; with `wanted_S` that of these rows only."""
        if wanted_S is not None and shared.attend_last is not None:
            return self._of_wanted(x_TD, shared, wanted_S, shared.attend_last)
        products = [self._heads(qkv(x_TD)) for qkv in self._qkv]
        qkv_TNH = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        qk_TMH = qkv_TNH[:, : self._num_heads + self._num_kv_heads]
        self._normalise_and_rotate(qk_TMH, self._qk_norm, shared.angles)
        self._insert(qkv_TNH[:, self._num_heads :], shared)
        attended_TI = shared.attend(self._layer, qkv_TNH)
        return self._out(attended_TI if wanted_S is None else attended_TI[wanted_S])

    def _of_wanted(
        self, x_TD: Tensor, shared: Pass, wanted_S: Tensor, attend_last: Attend
    ) -> Tensor:
        """Compute K and V of all rows, and the rest of some."""
        q, kv = self._qkv
        kv_TXH = self._heads(kv(x_TD))
        self._normalise_and_rotate(kv_TXH[:, : self._num_kv_heads], self._k_norm, shared.angles)
        self._insert(kv_TXH, shared)
        q_SNH = self._heads(q(x_TD[wanted_S]))
        self._normalise_and_rotate(q_SNH, self._q_norm, shared.angles.of(wanted_S))
        return self._out(attend_last(self._layer, q_SNH))

    def _heads(self, x_TI: Tensor) -> Tensor:
        return x_TI.view(len(x_TI), x_TI.shape[1] // self._head_size, self._head_size)

    def _normalise_and_rotate(self, x_TMH: Tensor, norm: NormWeight, angles: Angles) -> None:
        self._rows.norm_rotate(x_TMH, norm, angles.cos_T1H, angles.sin_T1H)

    def _insert(self, kv_TXH: Tensor, shared: Pass) -> None:
        cells = shared.cache.cells[self._layer]
        self._rows.insert(cells, shared.slot_mapping_TX, kv_TXH)
        if shared.on_layer is not None:
            shared.on_layer(self._layer)
