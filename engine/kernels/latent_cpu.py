"""Attention over latents on the CPU, in torch's operators. Owns no memory and no indices.

Sequence by sequence: all heads look at the same cells, so that the heads of one token already make
a matrix product; blocks that lie side by side are a view of the cache. Legend: as
engine.kernels.gpu.latent; Q query rows of one sequence, L its cells.

Deterministic attention is in copies of cells that begin where every other one does, and a prompt's
in slices at fixed positions, as engine.kernels.attention_fixed has it.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch, PrefillSpan
from engine.kernels import attention_native, latent_prompts
from engine.kernels.attention_native import Piece
from engine.kernels.latent_prompts import LatentWeights

# Scores that a slice of queries may have in all: 32 MiB in bf16.
_SLICE_SCORES = 1 << 24
_PART_BYTES = 64 << 20  # of keys and values that are made at a time
_FIXED_ROWS = 512  # of a slice at a fixed position: those of all heads of its tokens


class LatentAttention:
    """See `AttentionKernel`; queries are scaled, and what is returned are mixed latents."""

    def __init__(self, latent: int, *, deterministic: bool = False) -> None:
        """`latent` elements of a cell are the value too.

        What a token gets depends on its sequence alone with `deterministic`.
        """
        self._latent = latent
        self._is_fixed = deterministic

    def __call__(self, qkv_TNX: Tensor, cache_runs: Tensor, batch: Batch, num_heads: int) -> Tensor:
        tokens, _, size = qkv_TNX.shape
        out_TNC = qkv_TNX.new_empty(tokens, num_heads, self._latent)
        q_TNX = qkv_TNX[:, :num_heads]
        rows = batch.decode
        for row, (length, table) in enumerate(zip(rows.lengths, rows.tables, strict=True)):
            part = slice(row, row + 1)
            cells_LX = _cells(cache_runs, table, size, copied=self._is_fixed)[:length]
            q_1NX = q_TNX[part].clone() if self._is_fixed else q_TNX[part]
            self._attend(q_1NX, cells_LX, out_TNC[part])
        attend = self._attend_fixed if self._is_fixed else self._attend
        for span in batch.prefill:
            part = slice(span.begin, span.end)
            cells_LX = _cells(cache_runs, span.table, size)[: span.start + span.end - span.begin]
            attend(q_TNX[part], cells_LX, out_TNC[part])
        return out_TNC.flatten(1)

    def _attend(self, q_QNX: Tensor, cells_LX: Tensor, out_QNC: Tensor) -> None:
        """Attend the queries of a sequence's last tokens, slice by slice."""
        queries, heads, _ = q_QNX.shape
        before = len(cells_LX) - queries
        each = max(1, _SLICE_SCORES // (heads * len(cells_LX)))
        for begin in range(0, queries, each):
            end = min(begin + each, queries)
            seen_LX = cells_LX[: before + end]
            scores = q_QNX[begin:end].flatten(0, 1) @ seen_LX.T
            if end - begin > 1:
                square = scores.new_full((end - begin, end - begin), -torch.inf).triu_(1)
                diagonal = scores.view(end - begin, heads, -1)[..., before + begin :]
                diagonal += square[:, None]
            mixed = scores.softmax(-1) @ seen_LX[:, : self._latent]
            out_QNC[begin:end] = mixed.view(end - begin, heads, -1)

    def _attend_fixed(self, q_QNX: Tensor, cells_LX: Tensor, out_QNC: Tensor) -> None:
        """As `_attend`, whatever of the sequence was computed before."""
        queries, heads, size = q_QNX.shape
        each = max(1, _FIXED_ROWS // heads)
        start = len(cells_LX) - queries
        first, after = start // each * each, -(-len(cells_LX) // each) * each
        padded_QNX = q_QNX.new_zeros(after - first, heads, size)
        padded_QNX[start - first : start - first + queries] = q_QNX
        padded_LX = cells_LX.new_zeros(after, size)
        padded_LX[: len(cells_LX)] = cells_LX
        future = cells_LX.new_full((each, each), -torch.inf).triu_(1)[:, None]
        mixed_QNC = q_QNX.new_empty(after - first, heads, self._latent)
        for begin in range(first, after, each):
            part = slice(begin - first, begin - first + each)
            seen_LX = padded_LX[: begin + each]
            scores = padded_QNX[part].flatten(0, 1) @ seen_LX.T
            scores.view(each, heads, -1)[..., begin:] += future
            mixed = scores.softmax(-1) @ seen_LX[:, : self._latent]
            mixed_QNC[part] = mixed.view(each, heads, -1)
        out_QNC.copy_(mixed_QNC[start - first : start - first + queries])


def attend_prompt(
    q_QNK: Tensor, cache_runs: Tensor, span: PrefillSpan, weights: LatentWeights
) -> Tensor:
    """See `engine.kernels.AttendPrompt`."""
    size = weights.keys_NEC.shape[2] + q_QNK.shape[2] - weights.keys_NEC.shape[1]
    cells_LX = _cells(cache_runs, span.table, size)[: span.start + len(q_QNK)]
    return latent_prompts.attend(q_QNK, cells_LX, weights, _attend_heads, _PART_BYTES)


def _attend_heads(q_QNK: Tensor, both_LXK: Tensor) -> Tensor:
    """See `AttendHeads`: with the compiled kernel where it can, else slice by slice."""
    native = attention_native.attention()
    if native is None or not attention_native.fits(q_QNK, both_LXK):
        return _attend_slices(q_QNK, both_LXK)
    end_Q = np.arange(len(both_LXK) - len(q_QNK), len(both_LXK)) + 1
    out_QNK = q_QNK.new_empty(q_QNK.shape)
    seen = np.zeros_like(end_Q), end_Q
    native([Piece(q_TNH=q_QNK, kv_LXH=both_LXK, out_TNH=out_QNK, seen=seen)])
    return out_QNK


def _attend_slices(q_QNK: Tensor, both_LXK: Tensor) -> Tensor:
    queries, heads, _ = q_QNK.shape
    before = len(both_LXK) - queries
    k_NKL, v_NLK = both_LXK[:, :heads].permute(1, 2, 0), both_LXK[:, heads:].transpose(0, 1)
    out_QNK = torch.empty_like(q_QNK)
    each = max(1, _SLICE_SCORES // (heads * len(both_LXK)))
    for begin in range(0, queries, each):
        end = min(begin + each, queries)
        scores = q_QNK[begin:end].transpose(0, 1) @ k_NKL[:, :, : before + end]
        square = scores.new_full((end - begin, end - begin), -torch.inf).triu_(1)
        scores[:, :, before + begin :] += square
        out_QNK[begin:end] = (scores.softmax(-1) @ v_NLK[:, : before + end]).transpose(0, 1)
    return out_QNK


def _cells(
    cache_runs: Tensor, table: NDArray[np.int64], size: int, *, copied: bool = False
) -> Tensor:
    """Return the cells of blocks, [L, X]; where they lie if they can be had there, and may."""
    first, count = int(table[0]), len(table)
    if not copied and (np.diff(table) == 1).all():
        blocks = cache_runs[first : first + count]
    else:
        blocks = cache_runs.index_select(0, torch.from_numpy(table))
    return blocks.view(-1, size)
