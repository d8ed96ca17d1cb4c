"""What a model computes with on a GPU: the kernels and torch's products, behind the engine's seams.

Owns no memory but experts' weights. Legend: T tokens of a pass, D hidden size, N query heads, G KV
heads, P places of a block, H head size, I inner size, E experts, S rows, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.batch import Batch, PrefillSpan
from engine.errors import UnsupportedError
from engine.kernels import latent_prompts
from engine.kernels.experts import Put
from engine.kernels.gpu.options import DecodeOptions, Seen
from engine.kernels.latent_prompts import LatentWeights
from engine.kernels.rows import Routes, RowKernels
from engine.kernels.step import EndWeights, LayerWeights, Product, Step
from engine.kernels.table import PagedKernels, paged_kernels
from engine.kvcache import KVCache

# Queries are scaled before (engine.layers.attention).
_SCALED = DecodeOptions()
_PART_BYTES = 512 << 20  # of keys and values that are made of latents at a time


def kernels(*, deterministic: bool = False) -> PagedKernels:
    """Return a GPU's kernels; raises UnsupportedError without Triton, and for `deterministic`.

    A product's bits depend on how many rows it has: cuBLAS chooses by that.
    """
    if deterministic:
        raise UnsupportedError("no deterministic kernels for the device cuda; there are: cpu")
    return paged_kernels(torch.device("cuda"))


class Attention:
    """See `AttentionKernel`. New tokens' keys are read from the cache like any other."""

    def __init__(self, *, deterministic: bool = False) -> None:
        self._kernels = kernels(deterministic=deterministic)

    def __call__(self, qkv_TNH: Tensor, cache_runs: Tensor, batch: Batch, num_heads: int) -> Tensor:
        tokens, _, size = qkv_TNH.shape
        k_BGPH, v_BGPH = _cached(cache_runs, batch.decode.cache, size)
        out_TNH = qkv_TNH.new_empty(tokens, num_heads, size)
        rows = batch.decode
        if rows:
            tables_SB, lengths_S = rows.on_device
            part = slice(len(rows))
            q_SNH = qkv_TNH[part, :num_heads]
            out_TNH[part] = self._kernels.decode(
                q_SNH, k_BGPH, v_BGPH, tables_SB, lengths_S, rows.lengths[0], _SCALED
            )[0]
        for span in batch.prefill:
            part = slice(span.begin, span.end)
            table_B, first_T, end_T = span.on_device
            seen = Seen(first_T, end_T, span.start + span.end - span.begin)
            out_TNH[part] = self._kernels.block(
                qkv_TNH[part, :num_heads], k_BGPH, v_BGPH, seen, table_B=table_B
            )[0]
        return out_TNH.view(tokens, num_heads * size)


class LatentAttention:
    """See `AttentionKernel`: over one cell a token; what is returned are mixed latents."""

    def __init__(self, latent: int, *, deterministic: bool = False) -> None:
        """`latent` elements of a cell are the value too."""
        self._attend = kernels(deterministic=deterministic).latent
        self._latent = latent

    def __call__(self, qkv_TNX: Tensor, cache_runs: Tensor, batch: Batch, num_heads: int) -> Tensor:
        tokens, _, size = qkv_TNX.shape
        cells_BPX = cache_runs.view(len(cache_runs), -1, size)
        out_TNC = qkv_TNX.new_empty(tokens, num_heads, self._latent)
        rows = batch.decode
        if rows:
            part = slice(len(rows))
            q_SNX, on_device = qkv_TNX[part, :num_heads], rows.on_device
            seen = (*on_device, rows.lengths[0])
            out_TNC[part] = self._attend(q_SNX, cells_BPX, self._latent, *seen)[0]
        for span in batch.prefill:
            part = slice(span.begin, span.end)
            table_B, _, end_T = span.on_device
            seen = (table_B.expand(len(end_T), -1), end_T, span.start + span.end - span.begin)
            q_TNX = qkv_TNX[part, :num_heads]
            out_TNC[part] = self._attend(q_TNX, cells_BPX, self._latent, *seen)[0]
        return out_TNC.flatten(1)


def attend_prompt(
    q_QNK: Tensor, cache_runs: Tensor, span: PrefillSpan, weights: LatentWeights
) -> Tensor:
    """See `engine.kernels.AttendPrompt`."""
    size = weights.keys_NEC.shape[2] + q_QNK.shape[2] - weights.keys_NEC.shape[1]
    table_B, first_Q, end_Q = span.on_device
    end = span.start + len(q_QNK)
    cells_LX = cache_runs.index_select(0, table_B).view(-1, size)[:end]
    seen = Seen(first_Q, end_Q, end)
    block = paged_kernels(q_QNK.device).block

    value_size = weights.values_NCV.shape[2]

    def attend_heads(q_QNK: Tensor, both_LXK: Tensor) -> Tensor:
        k_LNK, v_LNK = both_LXK.chunk(2, dim=1)
        return block(q_QNK, k_LNK, v_LNK[:, :, :value_size], seen)[0]

    return latent_prompts.attend(q_QNK, cells_LX, weights, attend_heads, _PART_BYTES)


def _cached(cache_runs: Tensor, cache: KVCache, size: int) -> tuple[Tensor, Tensor]:
    """Return a layer's keys and values, [B, G, P, H] each."""
    shape = 2, cache.num_blocks, cache.num_heads, cache.block_size, size
    k_BGPH, v_BGPH = cache_runs.view(shape).unbind()
    return k_BGPH, v_BGPH


def product(weight_OI: Tensor, *, deterministic: bool = False) -> Product:
    """Return torch's product with a weight, which is kept; see `ProductKernel`."""
    kernels(deterministic=deterministic)
    return lambda x_TI: F.linear(x_TI, weight_OI)


def router(router_ED: Tensor, dtype: torch.dtype, *, deterministic: bool = False) -> Product:
    """Return what makes fp32 scores [T, E] of rows; the weight, fp32, must outlive it."""
    kernels(deterministic=deterministic)
    return lambda x_TD: F.linear(x_TD.float(), router_ED)


class Experts:
    """See `engine.kernels.experts.Experts`. Pairs are sorted on the device."""

    def __init__(self, gate_up: Tensor, down: Tensor, *, deterministic: bool = False) -> None:
        """`gate_up` [E, 2I, D] and `down` [E, D, I] are kept."""
        self._kernels = kernels(deterministic=deterministic)
        self._gate_up, self._down = gate_up, down

    def __call__(self, x_TD: Tensor, routes: Routes) -> Tensor:
        """See there."""
        chosen = routes.experts_TK, routes.weights_TK
        return self._kernels.experts(x_TD, self._gate_up, self._down, *chosen)

    def pairs(self, x_TD: Tensor, tokens_P: Tensor, experts_P: Tensor) -> Tensor:
        """See there."""
        weights = self._gate_up, self._down
        return self._kernels.expert_pairs(x_TD, *weights, tokens_P, experts_P)

    def stage(self, gate_up: Tensor, down: Tensor) -> Put:
        """See there."""

        def put(expert: int) -> None:
            self._gate_up[expert], self._down[expert] = gate_up, down

        return put


def rows(dtype: torch.dtype, *, deterministic: bool = False) -> RowKernels:
    """Return what is done to rows by a model of this dtype."""
    return kernels(deterministic=deterministic).rows(dtype)


def argmax_finder() -> Callable[[Tensor], list[int]]:
    """Return `argmax`."""
    return argmax


def argmax(logits_SV: Tensor) -> list[int]:
    """Return the token of the greatest fp32 logit of each row: the first of equals, or of NaNs."""
    largest_S1 = logits_SV.amax(-1, keepdim=True)  # NaN where there is one
    is_largest_SV = (logits_SV == largest_S1) | logits_SV.isnan()
    # Which of equals torch's own argmax gives is not said, and differs on GPUs.
    at_V = torch.arange(logits_SV.shape[1], device=logits_SV.device)
    first_S = at_V.masked_fill(~is_largest_SV, logits_SV.shape[1]).amin(-1)
    token_ids: list[int] = first_S.tolist()
    return token_ids


def draw() -> Callable[..., Tensor]:
    """Return what draws tokens."""
    return kernels().draw


def no_step(layers: Sequence[LayerWeights], end: EndWeights | None) -> Step | None:
    """Leave a step to the layers' own kernels; see `StepKernel`."""
    return None
