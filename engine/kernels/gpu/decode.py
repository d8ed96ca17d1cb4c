"""Attention of decoding sequences, one new token each, over the paged cache.

Owns no cache and no tables. Legend: S sequences, B blocks of a table, N query heads, G KV heads,
R = N / G query heads that share a KV head, P places of a block, C parts of the keys, H head size.

A program reads the keys of one KV head once for all R query heads. So that few sequences still fill
the device, keys are split into C parts (Flash-Decoding, Dao et al. 2023), which a second kernel
merges. Where a sequence is cut depends on `split_tokens` alone, not on what else is in the batch.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu import softmax
from engine.kernels.gpu.merge import merge_parts
from engine.kernels.gpu.options import DecodeOptions
from engine.kernels.gpu.runtime import (
    INTERPRETED,
    SHARED_BYTES,
    check_grid,
    check_heads,
    check_rows,
    most_of,
    multiprocessors,
    padded,
    padded_rows,
    paged_buffers,
)
from engine.kernels.gpu.tune import Choices, Tile, bucket, tuned

_EVERYTHING = 2**30  # a window that hides nothing
_PROGRAMS = 2  # for each multiprocessor: one loads while another computes
TILES = (
    Tile(keys=64, warps=4, stages=3),
    Tile(keys=128, warps=4, stages=3),
    Tile(keys=32, warps=4, stages=3),
    Tile(keys=16, warps=4, stages=2),
    Tile(keys=64, warps=4, stages=5),
    Tile(keys=32, warps=4, stages=5),
    Tile(keys=128, warps=8, stages=5),
)


@triton.jit(do_not_specialize=["tables_s", "lse_s", "lse_n"])
def _decode_kernel(
    q,
    k,
    v,
    tables,
    lengths,
    out,
    lse,
    q_s,
    q_n,
    k_b,
    k_g,
    k_p,
    v_b,
    v_g,
    v_p,
    tables_s,
    out_s,
    out_n,
    out_c,
    lse_s,
    lse_n,
    scale,
    cap,
    window,
    split_tokens,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_LSE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    length = tl.load(lengths + sequence).to(tl.int32)
    begin = tl.maximum(length - window, 0) + part * split_tokens
    end = tl.minimum(begin + split_tokens, length)

    shared = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    heads = group * SHARED + shared
    in_rows = (shared < SHARED)[:, None] & (columns < SIZE)[None, :]
    queries = tl.load(
        q + sequence * q_s + heads[:, None] * q_n + columns[None, :], mask=in_rows, other=0.0
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, KEYS):
        keys = first + tl.arange(0, KEYS)
        held = keys < end
        block = tl.load(tables + sequence * tables_s + keys // PLACES, mask=held, other=0)
        block = block.to(tl.int64)
        place = keys % PLACES
        # Nothing behind the last token is read: it is another sequence's, or NaN.
        in_keys = held[:, None] & (columns < SIZE)[None, :]
        k_at = k + (block * k_b + group * k_g + place * k_p)[:, None] + columns[None, :]
        v_at = v + (block * v_b + group * v_g + place * v_p)[:, None] + columns[None, :]
        keys_of_tile = tl.load(k_at, mask=in_keys, other=0.0)
        values_of_tile = tl.load(v_at, mask=in_keys, other=0.0)
        scores = softmax.scored(queries, keys_of_tile, scale, cap, CAPPED, UPCAST)
        scores = tl.where(held[None, :], scores, float("-inf"))
        top, total, mixed = softmax.take_in(scores, values_of_tile, top, total, mixed, UPCAST)
    result, result_lse = softmax.finished(top, total, mixed)
    out_at = out + sequence * out_s + heads[:, None] * out_n + part * out_c + columns[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=in_rows)
    if HAS_LSE:
        lse_at = lse + sequence * lse_s + heads * lse_n + part
        tl.store(lse_at, result_lse, mask=shared < SHARED)


def decode(
    q_SNH: Tensor,
    k_BGPH: Tensor,
    v_BGPH: Tensor,
    tables_SB: Tensor,
    lengths_S: Tensor,
    longest: int,
    options: DecodeOptions,
    *,
    with_lse: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return attention, [S, N, H] in the queries' dtype, and its natural-log LSE [S, N] in fp32.

    `lengths_S` count a sequence's keys, that of its new token included, and none is above
    `longest`, which is known without asking the device. A sequence of no keys gets zeros and -inf.
    Tables may hold anything behind a sequence's last block.
    """
    check_rows(q_SNH, k_BGPH, v_BGPH, tables_SB, lengths_S)
    sequences, heads, size = q_SNH.shape
    kv_heads, places = k_BGPH.shape[1:3]
    check_heads(q_SNH, kv_heads, k_BGPH.shape[3])
    out_SNH = torch.empty_like(q_SNH, memory_format=torch.contiguous_format)
    fp32 = partial(torch.empty, dtype=torch.float32, device=q_SNH.device)
    lse_SN = fp32((sequences, heads)) if with_lse else None
    if not out_SNH.numel():
        return out_SNH, lse_SN
    shared = heads // kv_heads
    window = _EVERYTHING if options.window is None else options.window
    seen = max(1, min(longest, window))
    tile = tile or tuned(q_SNH.device, choices(q_SNH, kv_heads, seen))
    split = options.split_tokens or _split_tokens(seen, tile.keys, sequences * kv_heads, q_SNH)
    parts = triton.cdiv(seen, split)
    check_grid(max(parts, kv_heads), "parts or KV heads")
    if parts == 1:
        into, into_lse = out_SNH[:, :, None], None if lse_SN is None else lse_SN[:, :, None]
    else:
        into = fp32((sequences, heads, parts, size))
        into_lse = fp32((sequences, heads, parts))
    _decode_kernel[(sequences, kv_heads, parts)](
        q_SNH,
        k_BGPH,
        v_BGPH,
        tables_SB,
        lengths_S,
        into,
        into if into_lse is None else into_lse,
        *q_SNH.stride()[:2],
        *k_BGPH.stride()[:3],
        *v_BGPH.stride()[:3],
        tables_SB.stride(0),
        *into.stride()[:3],
        *(into if into_lse is None else into_lse).stride()[:2],
        options.scale,
        options.soft_cap or 1.0,
        window,
        split,
        SHARED=shared,
        SIZE=size,
        PLACES=places,
        ROWS=padded_rows(shared),
        COLUMNS=padded_rows(size),
        KEYS=tile.keys,
        CAPPED=options.soft_cap is not None,
        HAS_LSE=into_lse is not None,
        UPCAST=INTERPRETED,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if parts > 1:
        assert into_lse is not None
        merge_parts(into, into_lse, out_SNH, lse_SN)
    return out_SNH, lse_SN


def _split_tokens(seen: int, tile_keys: int, rows: int, q_SNH: Tensor) -> int:
    """Return how many keys a part has, whole tiles, for about as many programs as run at once."""
    wanted = max(1, _PROGRAMS * multiprocessors(q_SNH.device) // rows)
    tiles: int = triton.cdiv(triton.cdiv(seen, tile_keys), wanted)
    return tiles * tile_keys


def choices(q_SNH: Tensor, kv_heads: int, seen: int) -> Choices:
    """Return the tiles for queries like these that look at `seen` keys.

    K and V of a tile, in all stages, must fit a multiprocessor's shared memory.
    """
    heads, size = q_SNH.shape[1:]
    row_bytes = padded(size) * q_SNH.element_size()
    fitting = [
        tile
        for tile in TILES
        if tile.keys <= most_of(q_SNH.dtype)
        and 2 * tile.keys * paged_buffers(tile.stages) * row_bytes <= SHARED_BYTES
    ]
    return Choices(name=bucket("decode", q_SNH.dtype, size, heads // kv_heads, seen), tiles=fitting)
