"""Attention over latents on the CPU, in torch's operators. Owns no memory and no indices.

Sequence by sequence: all heads look at the same cells, so that the heads of one token already make
a matrix product; blocks that lie side by side are a view of the cache. Legend: as
engine.kernels.gpu.latent; Q query rows of one sequence, L its cells.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch
from engine.errors import UnsupportedError

# Scores that a slice of queries may have in all: 32 MiB in bf16.
_SLICE_SCORES = 1 << 24


class LatentAttention:
    """See `AttentionKernel`; queries are scaled, and what is returned are mixed latents."""

    def __init__(self, latent: int, *, deterministic: bool = False) -> None:
        """`latent` elements of a cell are the value too."""
        if deterministic:
            raise UnsupportedError("no deterministic kernels for attention over latents yet")
        self._latent = latent

    def __call__(self, qkv_TNX: Tensor, cache_runs: Tensor, batch: Batch, num_heads: int) -> Tensor:
        tokens, _, size = qkv_TNX.shape
        out_TNC = qkv_TNX.new_empty(tokens, num_heads, self._latent)
        q_TNX = qkv_TNX[:, :num_heads]
        rows = batch.decode
        for row, (length, table) in enumerate(zip(rows.lengths, rows.tables, strict=True)):
            part = slice(row, row + 1)
            cells_LX = _cells(cache_runs, table, size)[:length]
            self._attend(q_TNX[part], cells_LX, out_TNC[part])
        for span in batch.prefill:
            part = slice(span.begin, span.end)
            cells_LX = _cells(cache_runs, span.table, size)[: span.start + span.end - span.begin]
            self._attend(q_TNX[part], cells_LX, out_TNC[part])
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


def _cells(cache_runs: Tensor, table: NDArray[np.int64], size: int) -> Tensor:
    """Return the cells of blocks, [L, X]."""
    first, count = int(table[0]), len(table)
    if (np.diff(table) == 1).all():
        blocks = cache_runs[first : first + count]
    else:
        blocks = cache_runs.index_select(0, torch.from_numpy(table))
    return blocks.view(-1, size)
