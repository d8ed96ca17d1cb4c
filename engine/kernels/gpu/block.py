"""Attention of some of a sequence's queries over some of its keys: prefill's, or a ring's step.

Owns no memory. Legend: T query rows, L key rows, N query heads, G KV heads, R = N / G query heads
that share a KV head, B blocks of a table, P places of a block, H head size of queries and keys, V
that of values.

A query looks at a range of key rows, so that causal attention at any offset, windows and the shares
of a ring are the same to the kernel. A tile's rows are queries times the R heads that share their
keys; a mask is needed only in the tiles that some of them see and others do not.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu import softmax
from engine.kernels.gpu.options import Seen
from engine.kernels.gpu.runtime import (
    INTERPRETED,
    SHARED_BYTES,
    check_grid,
    check_heads,
    check_rows,
    most_of,
    padded,
    padded_rows,
)
from engine.kernels.gpu.tune import Choices, Tile, bucket, tuned

TILES = (
    Tile(rows=128, keys=64, warps=8, stages=3),
    Tile(rows=128, keys=128, warps=8, stages=2),
    Tile(rows=128, keys=64, warps=8, stages=5),
    Tile(rows=64, keys=64, warps=4, stages=3),
    Tile(rows=64, keys=64, warps=8, stages=2),
    Tile(rows=64, keys=32, warps=8, stages=2),
    Tile(rows=32, keys=32, warps=8, stages=2),
    Tile(rows=16, keys=16, warps=4, stages=2),
)
_MOST_SUMS = 64  # of a thread, each in a register; with twice as many it spills
_LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _taken_in(
    queries,
    k,
    v,
    table,
    k_b,
    k_p,
    v_b,
    v_p,
    first,
    end,
    low,
    high,
    scale,
    cap,
    top,
    total,
    mixed,
    SIZE: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    PAGED: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Take in the tile of keys from `first` on, none at or behind `end`."""
    columns = tl.arange(0, COLUMNS)
    value_columns = tl.arange(0, VALUE_COLUMNS)
    keys = first + tl.arange(0, KEYS)
    held = keys < end
    if PAGED:
        block = tl.load(table + keys // PLACES, mask=held, other=0).to(tl.int64)
        k_rows = block * k_b + (keys % PLACES) * k_p
        v_rows = block * v_b + (keys % PLACES) * v_p
    else:
        k_rows = keys.to(tl.int64) * k_p
        v_rows = keys.to(tl.int64) * v_p
    in_k = held[:, None] & (columns < SIZE)[None, :]
    in_v = held[:, None] & (value_columns < VALUE_SIZE)[None, :]
    k_tile = tl.load(k + k_rows[:, None] + columns[None, :], mask=in_k, other=0.0)
    v_tile = tl.load(v + v_rows[:, None] + value_columns[None, :], mask=in_v, other=0.0)
    scores = softmax.scored(queries, k_tile, scale, cap, CAPPED, UPCAST)
    if MASKED:
        seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    return softmax.take_in(scores, v_tile, top, total, mixed, UPCAST)


@triton.jit(do_not_specialize=["tokens"])
def _block_kernel(
    q,
    k,
    v,
    table,
    lows,
    highs,
    out,
    lse,
    q_t,
    q_n,
    k_b,
    k_g,
    k_p,
    v_b,
    v_g,
    v_p,
    out_t,
    out_n,
    lse_t,
    lse_n,
    tokens,
    scale,
    cap,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    PAGED: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # The last queries first: causal, they have the most to do.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    token = rows // SHARED
    head = group * SHARED + rows % SHARED
    valid = token < tokens
    wide_token = token.to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    value_columns = tl.arange(0, VALUE_COLUMNS)
    inside = valid[:, None] & (columns < SIZE)[None, :]
    q_at = q + (wide_token * q_t + head * q_n)[:, None] + columns[None, :]
    queries = tl.load(q_at, mask=inside, other=0.0)
    low = tl.load(lows + token, mask=valid, other=_LAST)
    high = tl.load(highs + token, mask=valid, other=0)
    begin = tl.min(low, 0)
    end = tl.max(high, 0)
    # All rows see the keys from `shown` to `hidden`; the rows of padding do not count.
    shown = tl.max(tl.where(valid, low, 0), 0)
    hidden = tl.min(tl.where(valid, high, _LAST), 0)
    shown = begin + tl.cdiv(tl.maximum(shown - begin, 0), KEYS) * KEYS
    hidden = tl.maximum(begin + tl.maximum(hidden - begin, 0) // KEYS * KEYS, shown)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
    k += group * k_g
    v += group * v_g
    for first in range(begin, tl.minimum(shown, end), KEYS):
        top, total, mixed = _taken_in(
            queries, k, v, table, k_b, k_p, v_b, v_p, first, end, low, high, scale, cap,
            top, total, mixed, SIZE, PLACES, COLUMNS, KEYS, VALUE_SIZE, VALUE_COLUMNS, True, PAGED,
            CAPPED, UPCAST,
        )  # fmt: skip
    for first in range(shown, tl.minimum(hidden, end), KEYS):
        top, total, mixed = _taken_in(
            queries, k, v, table, k_b, k_p, v_b, v_p, first, end, low, high, scale, cap,
            top, total, mixed, SIZE, PLACES, COLUMNS, KEYS, VALUE_SIZE, VALUE_COLUMNS, False, PAGED,
            CAPPED, UPCAST,
        )  # fmt: skip
    for first in range(hidden, end, KEYS):
        top, total, mixed = _taken_in(
            queries, k, v, table, k_b, k_p, v_b, v_p, first, end, low, high, scale, cap,
            top, total, mixed, SIZE, PLACES, COLUMNS, KEYS, VALUE_SIZE, VALUE_COLUMNS, True, PAGED,
            CAPPED, UPCAST,
        )  # fmt: skip
    result, result_lse = softmax.finished(top, total, mixed)
    out_at = out + (wide_token * out_t + head * out_n)[:, None] + value_columns[None, :]
    tl.store(out_at, result, mask=valid[:, None] & (value_columns < VALUE_SIZE)[None, :])
    tl.store(lse + wide_token * lse_t + head * lse_n, result_lse, mask=valid)


def block(
    q_TNH: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    *,
    table_B: Tensor | None = None,
    scale: float = 1.0,
    soft_cap: float | None = None,
    out_TNV: Tensor | None = None,
    lse_TN: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention, [T, N, V], and its natural-log LSE, [T, N], both fp32.

    `k` is [L, G, H] and `v` [L, G, V], or with a table the cache's [B, G, P, H] and so on. Rows
    that see no key get zeros and -inf. Results go to `out_TNV` and `lse_TN` where they are given.
    """
    check_rows(q_TNH, k, v)
    tokens, heads, size = q_TNH.shape
    fp32 = partial(torch.empty, dtype=torch.float32, device=q_TNH.device)
    value_size = v.shape[-1]
    out_TNV = fp32((tokens, heads, value_size)) if out_TNV is None else out_TNV
    lse_TN = fp32((tokens, heads)) if lse_TN is None else lse_TN
    table = seen.low_T if table_B is None else table_B
    check_rows(out_TNV, table, seen.low_T, seen.high_T)
    if not out_TNV.numel():
        return out_TNV, lse_TN
    kv_heads = k.shape[1]
    check_heads(q_TNH, kv_heads, k.shape[-1])
    shared = heads // kv_heads
    tile = tile or tuned(q_TNH.device, choices(q_TNH, kv_heads, seen.end, value_size))
    check_grid(kv_heads, "KV heads")
    paged = table_B is not None
    _block_kernel[(triton.cdiv(tokens * shared, tile.rows), kv_heads)](
        q_TNH,
        k,
        v,
        table,
        seen.low_T,
        seen.high_T,
        out_TNV,
        lse_TN,
        *q_TNH.stride()[:2],
        *_strides(k, paged),
        *_strides(v, paged),
        *out_TNV.stride()[:2],
        *lse_TN.stride(),
        tokens,
        scale,
        soft_cap or 1.0,
        SHARED=shared,
        SIZE=size,
        PLACES=k.shape[2] if paged else 1,
        ROWS=tile.rows,
        COLUMNS=padded_rows(size),
        KEYS=tile.keys,
        VALUE_SIZE=value_size,
        VALUE_COLUMNS=padded_rows(value_size),
        PAGED=paged,
        CAPPED=soft_cap is not None,
        UPCAST=INTERPRETED,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_TNV, lse_TN


def _strides(kv: Tensor, paged: bool) -> tuple[int, int, int]:
    """Return those of blocks, KV heads and places; rows in order are one block."""
    if paged:
        return kv.stride(0), kv.stride(1), kv.stride(2)
    return 0, kv.stride(1), kv.stride(0)


def choices(q_TNH: Tensor, kv_heads: int, keys: int, value_size: int | None = None) -> Choices:
    """Return the tiles for queries like these and so many keys; values are as large unless told.

    Operands must fit a multiprocessor's shared memory, and a tile's sums the registers.
    """
    heads, size = q_TNH.shape[1:]
    value_size = value_size or size
    row_bytes, value_bytes = (padded(each) * q_TNH.element_size() for each in (size, value_size))
    fitting = [
        tile
        for tile in TILES
        if max(tile.rows, tile.keys) <= most_of(q_TNH.dtype)
        and tile.rows * row_bytes + tile.keys * tile.stages * (row_bytes + value_bytes)
        <= SHARED_BYTES
        and tile.rows * padded(value_size) <= _MOST_SUMS * 32 * tile.warps
    ]
    return Choices(name=bucket("block", q_TNH.dtype, size, heads // kv_heads, keys), tiles=fitting)
