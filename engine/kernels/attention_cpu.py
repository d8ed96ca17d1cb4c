"""Attention on the CPU. Owns no memory and no indices.

Legend: T tokens, S sequences, N query heads, G KV heads, R = N / G query heads that share a
KV head, L cached tokens, H head size.

In bf16 it is compiled code's, where the machine can have it: `decode_native` reads keys and values
once, where they lie, `attention_native` brings those of a prompt into another order first.

Else it is torch's. Decode gathers the blocks of a group's sequences into [2, S, G, L, H] with one
index_select, and runs one attention over the group: block by block, as a view of the cache could
be attended, measured 2 to 4 times slower with blocks of 16 tokens. Prefill is batched matmuls over
slices of the queries, which skip the keys after each slice, 1.5 to 2.5 times the speed of torch's
fused operator from 256 tokens on. softmax of a bf16 tensor computes in fp32 and rounds once.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from engine.batch import Batch, PrefillSpan
from engine.decode_rows import DecodeGroup, DecodeRows
from engine.kernels import attention_fixed, attention_native, decode_native
from engine.kernels.attention_native import Cached, Piece

# Decoding sequences times their length. Up to here the fused operator wins (measured in bf16).
_FUSED_TOKENS = 1024
# Queries in a slice, and the scores that a slice may have in all: 32 MiB in bf16.
_SLICE_QUERIES = 128
_SLICE_SCORES = 1 << 24

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attention(*, deterministic: bool = False) -> Callable[[Tensor, Tensor, Batch, int], Tensor]:
    """Return `attend`; what it calls is compiled by now, where it can be."""
    attention_native.attention()
    decode_native.attention()
    return partial(attend, deterministic=True) if deterministic else attend


def attend(
    qkv_TNH: Tensor,
    cache_runs: Tensor,
    batch: Batch,
    num_heads: int,
    *,
    deterministic: bool = False,
) -> Tensor:
    """Return causal attention, [T, num_heads * H]; see `AttentionKernel`.

    What a token gets depends on its sequence alone with `deterministic`, if decoding sequences are
    groups of one each; of compiled code's it always does.
    """
    tokens, _, head_size = qkv_TNH.shape
    out_TNH = qkv_TNH.new_empty(tokens, num_heads, head_size)
    if batch.decode:
        rows = slice(len(batch.decode))
        q_SNH = qkv_TNH[rows, :num_heads]
        _decode(q_SNH, cache_runs, batch.decode, out_TNH[rows], deterministic)
    if batch.prefill:
        form = attention_fixed.prefill if deterministic else _prefill_torch
        _prefill(qkv_TNH, cache_runs, batch.prefill, out_TNH, form)
    return out_TNH.view(tokens, num_heads * head_size)


def _decode(
    q_SNH: Tensor, cache_runs: Tensor, rows: DecodeRows, out_SNH: Tensor, deterministic: bool
) -> None:
    native = decode_native.attention()
    if native is not None and attention_native.fits(q_SNH):
        native(q_SNH, cache_runs, rows, out_SNH)
        return
    for group in rows.groups:
        part = slice(group.begin, group.end)
        # A copy lies as every other one does, wherever in the batch the group is.
        q = q_SNH[part].clone() if deterministic else q_SNH[part]
        out_SNH[part] = _decode_torch(q, cache_runs, group)


def _decode_torch(q_SNH: Tensor, cache_runs: Tensor, group: DecodeGroup) -> Tensor:
    sequences, _, head_size = q_SNH.shape
    kv = cache_runs.index_select(0, group.run_indices)
    if group.stale is not None:
        # Left from another sequence. A NaN there would survive a weight of zero.
        kv.view(-1, head_size).index_fill_(0, group.stale, 0)
    k_SGLH, v_SGLH = kv.view(2, sequences, -1, group.length, head_size).unbind()
    q_SGRH = q_SNH.view(sequences, k_SGLH.shape[1], -1, head_size)
    if sequences * group.length <= _FUSED_TOKENS:
        out_SGRH, _ = _flash(q_SGRH, k_SGLH, v_SGLH, attn_mask=group.mask_S11L, scale=1.0)
    else:
        scores_SGRL = torch.matmul(q_SGRH, k_SGLH.transpose(2, 3))
        if group.mask_S11L is not None:
            scores_SGRL += group.mask_S11L
        out_SGRH = torch.matmul(scores_SGRL.softmax(-1), v_SGLH)
    merged: Tensor = out_SGRH.reshape(q_SNH.shape)
    return merged


def _prefill(
    qkv_TNH: Tensor,
    cache_runs: Tensor,
    spans: Sequence[PrefillSpan],
    out_TNH: Tensor,
    form: Callable[[Tensor, Tensor, PrefillSpan, Tensor], None],
) -> None:
    native = attention_native.attention()
    if native is not None and attention_native.fits(qkv_TNH):
        native([_piece(qkv_TNH, cache_runs, span, out_TNH) for span in spans])
        return
    for span in spans:
        rows = slice(span.begin, span.end)
        form(qkv_TNH[rows], cache_runs, span, out_TNH[rows])


def _piece(qkv_TNH: Tensor, cache_runs: Tensor, span: PrefillSpan, out_TNH: Tensor) -> Piece:
    cached = None
    if span.run_indices is not None:
        cached = Cached(cache_runs, span.run_indices, span.start)
    qkv, num_heads = qkv_TNH[span.begin : span.end], out_TNH.shape[1]
    return Piece(
        q_TNH=qkv[:, :num_heads],
        kv_LXH=qkv[:, num_heads:],
        out_TNH=out_TNH[span.begin : span.end],
        cached=cached,
    )


def _prefill_torch(qkv_TNH: Tensor, cache_runs: Tensor, span: PrefillSpan, out_TNH: Tensor) -> None:
    tokens, num_heads, head_size = out_TNH.shape
    kv_heads = (qkv_TNH.shape[1] - num_heads) // 2
    k_GLH, v_GLH = _all_keys_and_values(qkv_TNH[:, num_heads:], cache_runs, span)
    q_GTRH = qkv_TNH[:, :num_heads].view(tokens, kv_heads, -1, head_size).transpose(0, 1)
    out_GTRH = out_TNH.view(tokens, kv_heads, -1, head_size).transpose(0, 1)

    queries = _SLICE_SCORES // (num_heads * (span.start + tokens))
    queries = max(1, min(queries, _SLICE_QUERIES, tokens))
    future = _future(queries, qkv_TNH.dtype, qkv_TNH.device)
    for begin in range(0, tokens, queries):
        end = min(begin + queries, tokens)
        seen = span.start + end
        q = q_GTRH[:, begin:end].reshape(kv_heads, -1, head_size)
        scores = torch.bmm(q, k_GLH[:, :seen].transpose(1, 2))
        diagonal = scores.view(kv_heads, end - begin, -1, seen)[..., span.start + begin :]
        diagonal += future[: end - begin, :, : end - begin]
        mixed = torch.bmm(scores.softmax(-1), v_GLH[:, :seen])
        out_GTRH[:, begin:end] = mixed.view(kv_heads, end - begin, -1, head_size)


def _all_keys_and_values(
    kv_TXH: Tensor, cache_runs: Tensor, span: PrefillSpan
) -> tuple[Tensor, Tensor]:
    """Return K and V, each [G, L, H], of the span's cached tokens and its new ones."""
    new_2GTH = kv_TXH.view(len(kv_TXH), 2, -1, kv_TXH.shape[2]).permute(1, 2, 0, 3)
    if span.run_indices is None:
        both = new_2GTH.contiguous()
    else:
        runs = cache_runs.index_select(0, span.run_indices)
        cached_2GLH = runs.view(2, new_2GTH.shape[1], -1, kv_TXH.shape[2])[:, :, : span.start]
        both = torch.cat((cached_2GLH, new_2GTH), dim=2)
    return both[0], both[1]


@cache
def _future(queries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [queries, 1, queries]: -inf where the key comes after the query, else 0."""
    square = torch.full((queries, queries), -torch.inf, dtype=dtype, device=device)
    return square.triu_(1)[:, None]
