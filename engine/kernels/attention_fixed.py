"""Attention of prompts in torch's operators that does not depend on how a prompt is cut.

A query's place in a slice follows from its position in the sequence, and so do the shapes of the
slice's products: whatever else is computed in the same pass, and however many tokens were cached.

Legend: T tokens, L keys, Q queries of a slice, N query heads, G KV heads, R = N / G query heads
that share a KV head, X = 2G, H head size.
"""

from functools import cache

import torch
from torch import Tensor

from engine.batch import PrefillSpan

_QUERIES = 32


def prefill(qkv_TNH: Tensor, cache_runs: Tensor, span: PrefillSpan, out_TNH: Tensor) -> None:
    """Attend the rows of a span; `qkv_TNH` and `out_TNH` are these rows alone."""
    tokens, num_heads, head_size = out_TNH.shape
    first = span.start // _QUERIES * _QUERIES  # where the first slice begins
    after = -(-(span.start + tokens) // _QUERIES) * _QUERIES
    kv_2GLH = _keys_and_values(qkv_TNH[:, num_heads:], cache_runs, span, after)
    kv_heads = kv_2GLH.shape[1]
    q_GTRH = qkv_TNH.new_zeros(kv_heads, after - first, num_heads // kv_heads, head_size)
    place = slice(span.start - first, span.start - first + tokens)
    q_GTRH[:, place] = _by_head(qkv_TNH[:, :num_heads], kv_heads)
    future = _future(qkv_TNH.dtype, qkv_TNH.device)
    mixed_GTRH = torch.empty_like(q_GTRH)
    for begin in range(first, after, _QUERIES):
        end = begin + _QUERIES
        part = slice(begin - first, end - first)
        # Copies, so that strides are the same for every prompt as well.
        k_GLH, v_GLH = kv_2GLH[:, :, :end].contiguous().unbind()
        scores = torch.bmm(q_GTRH[:, part].reshape(kv_heads, -1, head_size), k_GLH.mT)
        scores.view(kv_heads, _QUERIES, -1, end)[..., begin:] += future
        mixed = torch.bmm(scores.softmax(-1), v_GLH)
        mixed_GTRH[:, part] = mixed.view(kv_heads, _QUERIES, -1, head_size)
    out_TNH.copy_(mixed_GTRH[:, place].transpose(0, 1).flatten(1, 2))


def _keys_and_values(kv_TXH: Tensor, cache_runs: Tensor, span: PrefillSpan, room: int) -> Tensor:
    """Return [2, G, room, H]: the span's cached tokens, its new ones, and zeros."""
    tokens, both_heads, head_size = kv_TXH.shape
    kv_2GLH = kv_TXH.new_zeros(2, both_heads // 2, room, head_size)
    if span.run_indices is not None:
        runs = cache_runs.index_select(0, span.run_indices)
        cached = runs.view(2, both_heads // 2, -1, head_size)[:, :, : span.start]
        kv_2GLH[:, :, : span.start] = cached
    new = slice(span.start, span.start + tokens)
    kv_2GLH[:, :, new] = _by_head(kv_TXH, 2).transpose(1, 2)
    return kv_2GLH


def _by_head(x_TMH: Tensor, parts: int) -> Tensor:
    """Return [parts, T, M / parts, H] of heads side by side."""
    tokens, _, head_size = x_TMH.shape
    return x_TMH.reshape(tokens, parts, -1, head_size).transpose(0, 1)


@cache
def _future(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [Q, 1, Q]: -inf where the key comes after the query, else 0."""
    square = torch.full((_QUERIES, _QUERIES), -torch.inf, dtype=dtype, device=device)
    return square.triu_(1)[:, None]
