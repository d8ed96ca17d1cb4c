"""Attention over latents (MLA, DeepSeek-V2, arXiv 2405.04434): one small vector for each token.

Owns no cache and no tables. Legend: T query tokens, of any sequences, N heads, C latent size, R
size of the part that is turned, X = C + R elements of a cell, B blocks, P places of a block.

Queries have taken in the matrix that makes keys of latents, so that a cell is the key of all heads,
and its latent their value; what makes values of latents comes after. As all heads look at the same
cells, the heads of one token fill a tile, and tokens need not share one: a prompt's tokens are
queries with the same table and different lengths. Few tokens have their cells split into parts, as
in `decode`.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu import softmax
from engine.kernels.gpu.merge import merge_parts
from engine.kernels.gpu.runtime import (
    INTERPRETED,
    SHARED_BYTES,
    check_grid,
    check_rows,
    most_of,
    multiprocessors,
    padded_rows,
    paged_buffers,
)
from engine.kernels.gpu.tune import Choices, Tile, bucket, tuned

_MOST_ROWS = 64  # of a tile: the sums of wide latents fill the registers
TILES = (
    Tile(rows=64, keys=64, warps=8, stages=3),
    Tile(rows=64, keys=32, warps=8, stages=3),
    Tile(rows=64, keys=32, warps=8, stages=5),
    Tile(rows=32, keys=64, warps=8, stages=3),
    Tile(rows=32, keys=32, warps=8, stages=3),
    Tile(rows=16, keys=64, warps=8, stages=3),
    Tile(rows=16, keys=32, warps=4, stages=3),
    Tile(rows=16, keys=16, warps=4, stages=2),
)


@triton.jit(do_not_specialize=["tables_t", "lse_t", "lse_n"])
def _latent_kernel(
    q,
    cells,
    tables,
    lengths,
    out,
    lse,
    q_t,
    q_n,
    cells_b,
    cells_p,
    tables_t,
    out_t,
    out_n,
    out_c,
    lse_t,
    lse_n,
    scale,
    split_tokens,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    TURNED: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURNED_COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2)
    length = tl.load(lengths + token).to(tl.int32)
    begin = part * split_tokens
    end = tl.minimum(begin + split_tokens, length)

    heads = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    turned = tl.arange(0, TURNED_COLUMNS)
    there = heads < HEADS
    in_latent = there[:, None] & (columns < LATENT)[None, :]
    q_at = q + token * q_t + heads[:, None] * q_n
    queries = tl.load(q_at + columns[None, :], mask=in_latent, other=0.0)
    in_turned = there[:, None] & (turned < TURNED)[None, :]
    turned_queries = tl.load(q_at + LATENT + turned[None, :], mask=in_turned, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, KEYS):
        keys = first + tl.arange(0, KEYS)
        held = keys < end
        block = tl.load(tables + token * tables_t + keys // PLACES, mask=held, other=0)
        at = cells + (block.to(tl.int64) * cells_b + keys % PLACES * cells_p)[:, None]
        # Nothing behind the last token is read: it is another sequence's, or NaN.
        latents = tl.load(
            at + columns[None, :], mask=held[:, None] & (columns < LATENT)[None, :], other=0.0
        )
        turned_keys = tl.load(
            at + LATENT + turned[None, :],
            mask=held[:, None] & (turned < TURNED)[None, :],
            other=0.0,
        )
        scores = softmax.product(queries, tl.trans(latents), UPCAST)
        scores += softmax.product(turned_queries, tl.trans(turned_keys), UPCAST)
        scores = tl.where(held[None, :], scores * (scale * softmax.LOG2_E), float("-inf"))
        top, total, mixed = softmax.take_in(scores, latents, top, total, mixed, UPCAST)
    result, result_lse = softmax.finished(top, total, mixed)
    out_at = out + token * out_t + heads[:, None] * out_n + part * out_c + columns[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=in_latent)
    if HAS_LSE:
        tl.store(lse + token * lse_t + heads * lse_n + part, result_lse, mask=there)


def attend(
    q_TNX: Tensor,
    cells_BPX: Tensor,
    latent: int,
    tables_TB: Tensor,
    lengths_T: Tensor,
    longest: int,
    *,
    scale: float = 1.0,
    split_tokens: int | None = None,
    with_lse: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the mixed latents, [T, N, C] in the queries' dtype, and the natural-log LSE [T, N].

    `lengths_T` count the cells that a query sees, its own included, and none is above `longest`,
    which is known without asking the device. A query of none gets zeros and -inf. Tables may hold
    anything behind the last block, and one row of them may stand for all (a stride of 0).
    """
    check_rows(q_TNX, cells_BPX, tables_TB, lengths_T)
    tokens, heads, size = q_TNX.shape
    if cells_BPX.shape[-1] != size or not 0 < latent < size:
        raise ValueError(
            f"queries of {size} elements for cells of {cells_BPX.shape[-1]} with latents of "
            f"{latent}: both must have the latent and the part that is turned"
        )
    fp32 = partial(torch.empty, dtype=torch.float32, device=q_TNX.device)
    out_TNC = q_TNX.new_empty(tokens, heads, latent)
    lse_TN = fp32((tokens, heads)) if with_lse else None
    if not out_TNC.numel():
        return out_TNC, lse_TN
    tile = tile or tuned(q_TNX.device, choices(q_TNX, latent, longest))
    row_tiles = triton.cdiv(heads, tile.rows)
    split = split_tokens or _split_tokens(longest, tile.keys, tokens * row_tiles, q_TNX)
    parts = max(1, triton.cdiv(longest, split))
    check_grid(max(parts, row_tiles), "parts or tiles of heads")
    if parts == 1:
        into, into_lse = out_TNC[:, :, None], None if lse_TN is None else lse_TN[:, :, None]
    else:
        into, into_lse = fp32((tokens, heads, parts, latent)), fp32((tokens, heads, parts))
    _latent_kernel[(tokens, row_tiles, parts)](
        q_TNX,
        cells_BPX,
        tables_TB,
        lengths_T,
        into,
        into if into_lse is None else into_lse,
        *q_TNX.stride()[:2],
        *cells_BPX.stride()[:2],
        tables_TB.stride(0),
        *into.stride()[:3],
        *(into if into_lse is None else into_lse).stride()[:2],
        scale,
        split,
        HEADS=heads,
        LATENT=latent,
        TURNED=size - latent,
        PLACES=cells_BPX.shape[1],
        ROWS=tile.rows,
        COLUMNS=padded_rows(latent),
        TURNED_COLUMNS=padded_rows(size - latent),
        KEYS=tile.keys,
        HAS_LSE=into_lse is not None,
        UPCAST=INTERPRETED,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if parts > 1:
        assert into_lse is not None
        merge_parts(into, into_lse, out_TNC, lse_TN)
    return out_TNC, lse_TN


def _split_tokens(longest: int, tile_keys: int, programs: int, q_TNX: Tensor) -> int:
    """Return how many cells a part has, whole tiles, for about as many programs as run at once."""
    wanted = max(1, multiprocessors(q_TNX.device) // programs)
    tiles: int = triton.cdiv(triton.cdiv(max(1, longest), tile_keys), wanted)
    return tiles * tile_keys


def choices(q_TNX: Tensor, latent: int, longest: int) -> Choices:
    """Return the tiles for queries like these; more rows than there are heads are of no use.

    Queries, and a tile's cells in all stages, must fit a multiprocessor's shared memory.
    """
    heads, size = q_TNX.shape[1:]
    most = most_of(q_TNX.dtype)
    rows = min(_MOST_ROWS, padded_rows(heads), most)
    cell_bytes = (padded_rows(latent) + padded_rows(size - latent)) * q_TNX.element_size()
    fitting = [
        tile
        for tile in TILES
        if tile.rows <= rows
        and tile.keys <= most
        and (tile.rows + tile.keys * paged_buffers(tile.stages)) * cell_bytes <= SHARED_BYTES
    ]
    return Choices(name=bucket("latent", q_TNX.dtype, size, rows, longest), tiles=fitting)
