"""Latent attention (MLA) over the paged cache. Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.

What is cached of a token is one small vector, from which each head's key and value can be made.
Mostly they are not: a query takes in the matrix that makes its head's keys, so that the vector
itself is the key of all heads, and its latent part their value; the matrix that makes values comes
after. They are made where many queries look at them: a prompt's (engine.kernels.latent_prompts).

Legend: T tokens, D hidden size, N heads of this rank, C latent size, R size of what is turned, E
size of what is not, X = C + R elements of a cell, V size of a head's value, S rows, Q tokens of a
prompt, K = E + R elements of a query.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from engine.batch import PrefillSpan
from engine.config import ModelConfig
from engine.config_deepseek import LatentConfig
from engine.kernels import ProductKernel, product_kernel
from engine.kernels.latent_prompts import LatentWeights
from engine.kernels.rows import NormWeight
from engine.kernels.step import AttentionWeights
from engine.layers.attention import Pass
from engine.layers.layer import Placement
from engine.layers.linear import ColumnLinear, RowLinear
from engine.layers.rotary import Angles
from engine.weights import WeightSlot

_EPS = 1e-6  # of the norms within; no configuration has another


class LatentAttention:
    """One layer's attention; `name` is its place in the checkpoint, "model.layers.0.self_attn".

    Every tp rank has some of the heads, and the cells of all tokens.
    """

    def __init__(self, config: ModelConfig, layer: int, name: str, placement: Placement) -> None:
        assert config.latent is not None
        self._sizes = sizes = config.latent
        self._layer = layer
        self._name = name
        heads = placement.layout.tensor_part(config.num_heads)
        self._heads = heads
        self._num_heads = heads.stop - heads.start
        self._all_heads = config.num_heads
        self._rows = placement.rows
        hidden, device = config.hidden_size, placement.device
        self._cells = ColumnLinear(
            [(f"{name}.kv_a_proj_with_mqa", sizes.cell_size, slice(0, sizes.cell_size))],
            hidden,
            placement,
        )
        self._latent_norm = NormWeight(torch.empty(sizes.rank, device=device), _EPS)
        self._queries = _Queries(config, f"{name}.q", heads, placement)
        self._turn_queries = _constant(self._num_heads, sizes, sizes.scale, device)
        self._turn_keys = _constant(1, sizes, 1.0, device)
        per_head = sizes.plain_size + sizes.value_size
        self._loading_OC: Tensor | None = placement.empty(self._num_heads * per_head, sizes.rank)
        self._weights: LatentWeights
        self._heads_of: Callable[[LatentWeights], _Heads | _HeadsApart] = _Heads
        if placement.deterministic:
            self._heads_of = partial(_HeadsApart, product_kernel(device, deterministic=True))
        self._made: _Heads | _HeadsApart
        self._out = RowLinear(
            f"{name}.o_proj", config.num_heads * sizes.value_size, hidden, placement
        )

    def slots(self) -> Iterator[WeightSlot]:
        sizes = self._sizes
        yield from self._cells.slots()
        yield WeightSlot(
            name=f"{self._name}.kv_a_layernorm.weight",
            shape=(sizes.rank,),
            part=(),
            target=self._latent_norm.weight,
        )
        yield from self._queries.slots()
        assert self._loading_OC is not None
        per_head = sizes.plain_size + sizes.value_size
        yield WeightSlot(
            name=f"{self._name}.kv_b_proj.weight",
            shape=(self._all_heads * per_head, sizes.rank),
            part=(slice(self._heads.start * per_head, self._heads.stop * per_head),),
            target=self._loading_OC,
        )
        yield from self._out.slots()

    def prepare(self) -> None:
        sizes = self._sizes
        device = self._latent_norm.weight.device
        turned = sizes.rank + _halves(sizes.turned_size, device)
        self._cells.reorder(torch.cat((torch.arange(sizes.rank, device=device), turned)))
        self._cells.prepare()
        self._latent_norm.weight *= sizes.rank**0.5  # see engine.layers.norm
        self._queries.prepare()
        assert self._loading_OC is not None
        both_NOC = self._loading_OC.view(self._num_heads, -1, sizes.rank)
        self._weights = LatentWeights(
            both_NOC[:, : sizes.plain_size].contiguous(),
            both_NOC[:, sizes.plain_size :].transpose(1, 2).contiguous(),
            sizes.scale,
        )
        self._made = self._heads_of(self._weights)
        self._loading_OC = None
        self._out.prepare()

    def weights(self) -> AttentionWeights | None:
        """Return None: no step through all layers computes this."""
        return None

    def __call__(self, x_TD: Tensor, shared: Pass, wanted_S: Tensor | None) -> Tensor:
        """Return attention's output, [T, D]; with `wanted_S` that of these rows only."""
        sizes, heads = self._sizes, self._num_heads
        if wanted_S is not None and shared.attend_last is not None:
            cells_T1X = x_TD.new_empty(len(x_TD), 1, sizes.cell_size)
            self._make_cells(x_TD, cells_T1X, shared)
            q_SNX = x_TD.new_empty(len(wanted_S), heads, sizes.cell_size)
            self._take_in(self._make_queries(x_TD[wanted_S], shared.angles.of(wanted_S)), q_SNX)
            return self._out(self._values(shared.attend_last(self._layer, q_SNX)).flatten(1))
        both_TYX = x_TD.new_empty(len(x_TD), heads + 1, sizes.cell_size)
        self._make_cells(x_TD, both_TYX[:, heads:], shared)
        queries = self._make_queries(x_TD, shared.angles)
        if shared.prompts and _tokens(shared.prompts) == len(x_TD):
            values_TNV = x_TD.new_empty(len(x_TD), heads, sizes.value_size)
        else:
            self._take_in(queries, both_TYX[:, :heads])
            values_TNV = self._values(shared.attend(self._layer, both_TYX))
        for span in shared.prompts:
            assert shared.attend_prompt is not None
            rows = slice(span.begin, span.end)
            q_QNK = torch.cat([part[rows] for part in queries], -1)
            attended_QNV = shared.attend_prompt(self._layer, q_QNK, span, self._weights)
            values_TNV[rows] = attended_QNV
        values_TI = values_TNV.flatten(1)
        return self._out(values_TI if wanted_S is None else values_TI[wanted_S])

    def _make_cells(self, x_TD: Tensor, into_T1X: Tensor, shared: Pass) -> None:
        """Write what is kept of each token, here and to the cache."""
        rank, angles = self._sizes.rank, shared.angles
        made_TX = self._cells(x_TD)
        turned_T1R = made_TX[:, rank:].unsqueeze(1)
        self._rows.norm_rotate(turned_T1R, self._turn_keys, angles.cos_T1H, angles.sin_T1H)
        latent_TC = made_TX[:, :rank].to(torch.float32, copy=True)
        into_T1X[:, 0, :rank] = self._rows.norm(latent_TC.contiguous(), None, self._latent_norm)
        into_T1X[:, :, rank:] = turned_T1R
        cells = shared.cache.cells[self._layer]
        self._rows.insert(cells, shared.slot_mapping_TX, into_T1X)
        if shared.on_layer is not None:
            shared.on_layer(self._layer)

    def _make_queries(self, x_SD: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Return what is not turned, [S, N, E], and what is, [S, N, R], that scaled."""
        sizes, heads = self._sizes, self._num_heads
        made_SJ = self._queries(x_SD)
        plain = heads * sizes.plain_size
        turned_SNR = made_SJ[:, plain:].view(len(x_SD), heads, sizes.turned_size)
        self._rows.norm_rotate(turned_SNR, self._turn_queries, angles.cos_T1H, angles.sin_T1H)
        return made_SJ[:, :plain].view(len(x_SD), heads, sizes.plain_size), turned_SNR

    def _take_in(self, queries: tuple[Tensor, Tensor], into_SNX: Tensor) -> None:
        """Have queries take in the matrix that makes keys."""
        plain_SNE, turned_SNR = queries
        rank = self._sizes.rank
        into_SNX[:, :, rank:] = turned_SNR
        self._made.take_in(plain_SNE, into_SNX[:, :, :rank])

    def _values(self, mixed_SI: Tensor) -> Tensor:
        """Return each head's value of its mixed latent, [S, N, V]."""
        return self._made.values(mixed_SI.view(len(mixed_SI), self._num_heads, self._sizes.rank))


class _Heads:
    """What the matrices of all heads make of their rows, in a product for all."""

    def __init__(self, weights: LatentWeights) -> None:
        self._weights = weights

    def take_in(self, plain_SNE: Tensor, into_SNC: Tensor) -> None:
        """Write what queries have taken the keys' matrix in."""
        keys_NEC = self._weights.keys_NEC
        out_NSC = plain_SNE.new_empty(len(keys_NEC), len(plain_SNE), keys_NEC.shape[2])
        plain_NSE, scale = plain_SNE.transpose(0, 1), self._weights.scale
        # The scale before the product is rounded, not after.
        torch.baddbmm(out_NSC, plain_NSE, keys_NEC, beta=0, alpha=scale, out=out_NSC)
        into_SNC.copy_(out_NSC.transpose(0, 1))

    def values(self, mixed_SNC: Tensor) -> Tensor:
        """Return the values of mixed latents, [S, N, V]."""
        values_NSV = torch.bmm(mixed_SNC.transpose(0, 1), self._weights.values_NCV)
        return values_NSV.transpose(0, 1).contiguous()


class _HeadsApart:
    """As `_Heads`, with products that give a row the same whatever other rows there are."""

    def __init__(self, product: ProductKernel, weights: LatentWeights) -> None:
        self._keys, self._values = (
            [product(weight_IO.T.contiguous()) for weight_IO in of_heads]
            for of_heads in (weights.keys_NEC, weights.values_NCV)
        )
        self._scale = weights.scale

    def take_in(self, plain_SNE: Tensor, into_SNC: Tensor) -> None:
        """See `_Heads`."""
        for head, product in enumerate(self._keys):
            into_SNC[:, head] = product(plain_SNE[:, head]).mul_(self._scale)

    def values(self, mixed_SNC: Tensor) -> Tensor:
        """See `_Heads`."""
        rows = [product(mixed_SNC[:, head]) for head, product in enumerate(self._values)]
        return torch.stack(rows, dim=1)


class _Queries:
    """Makes queries, in one product or in two with a norm between; `name` is without "_proj".

    What is not turned of all heads comes first, then what is.
    """

    def __init__(self, config: ModelConfig, name: str, heads: slice, placement: Placement) -> None:
        assert config.latent is not None
        self._sizes = sizes = config.latent
        self._name = name
        self._heads = heads.stop - heads.start
        self._rows = placement.rows
        self._device = placement.device
        size, rank = sizes.query_size, sizes.query_rank
        self._down: ColumnLinear | None = None
        if rank is not None:
            self._down = ColumnLinear(
                [(f"{name}_a_proj", rank, slice(0, rank))], config.hidden_size, placement
            )
            self._norm = NormWeight(torch.empty(rank, device=placement.device), _EPS)
        part = slice(heads.start * size, heads.stop * size)
        self._up = ColumnLinear(
            [(f"{name}_proj" if rank is None else f"{name}_b_proj", config.num_heads * size, part)],
            config.hidden_size if rank is None else rank,
            placement,
        )

    def slots(self) -> Iterator[WeightSlot]:
        if self._down is not None:
            yield from self._down.slots()
            yield WeightSlot(
                name=f"{self._name}_a_layernorm.weight",
                shape=tuple(self._norm.weight.shape),
                part=(),
                target=self._norm.weight,
            )
        yield from self._up.slots()

    def prepare(self) -> None:
        if self._down is not None:
            self._down.prepare()
            self._norm.weight *= self._norm.weight.shape[0] ** 0.5  # see engine.layers.norm
        sizes = self._sizes
        first_N1 = torch.arange(self._heads, device=self._device)[:, None] * sizes.query_size
        plain_NE = first_N1 + torch.arange(sizes.plain_size, device=self._device)
        turned_NR = first_N1 + sizes.plain_size + _halves(sizes.turned_size, self._device)
        self._up.reorder(torch.cat((plain_NE.flatten(), turned_NR.flatten())))
        self._up.prepare()

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return the queries of rows, [T, N * E + N * R]."""
        if self._down is not None:
            x_TD = self._rows.norm(self._down(x_TD).float(), None, self._norm)
        return self._up(x_TD)


def _tokens(spans: Sequence[PrefillSpan]) -> int:
    return sum(span.end - span.begin for span in spans)


def _halves(size: int, device: torch.device) -> Tensor:
    """Return the order that puts what is turned together, neighbours, half a head apart."""
    return torch.arange(size, device=device).view(-1, 2).T.flatten()


def _constant(heads: int, sizes: LatentConfig, factor: float, device: torch.device) -> NormWeight:
    """Return what multiplies the turned part of heads, which is not normalised."""
    weight_NR = torch.full((heads, sizes.turned_size), factor, device=device)
    return NormWeight(weight_NR, None)
