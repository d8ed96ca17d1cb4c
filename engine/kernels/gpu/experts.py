"""The experts of a sparse layer: pairs sorted by expert, two grouped products, a weighted sum.

Owns no weights. Legend: T tokens, D hidden size, E experts, K choices of a token, P pairs of a
token and an expert (T * K of them, a token's side by side), I inner size, U = 2I (gates, then
ups), R rows of a tile.

Each expert's pairs fill tiles of R rows of their own, so that a program multiplies by one expert's
weights alone; the last tile of an expert is filled up with nobody. How many tiles there are only
the device knows: as many programs are started as there may be, and those without a tile end. So
nothing waits for the device, and a graph can capture it. In each expert pairs keep their order,
and a token's choices are added in theirs: with the same tile the result does not depend on who
else is in the batch.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu import softmax
from engine.kernels.gpu.runtime import (
    INTERPRETED,
    SHARED_BYTES,
    check_grid,
    check_rows,
    most_of,
    padded,
)
from engine.kernels.gpu.tune import Choices, Tile, bucket, tuned

_DEPTH = 64  # of the inner dimension, at a time
_CHUNK = 1024  # pairs that are looked at together
_SUM_TILE = 1024
_LEAST_ROWS, _MANY_ROWS, _MOST_ROWS = 16, 64, 128
# Columns, warps and stages: few rows are bound by memory, many by the matrix units.
_NARROW = ((64, 4, 3), (32, 4, 4), (128, 8, 3), (64, 8, 4), (32, 4, 2))
_WIDE = ((128, 8, 3), (64, 8, 4), (64, 4, 3), (32, 4, 4))
_NOBODY = tl.constexpr(-1)


@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(experts, counts, num_pairs, CHUNK: tl.constexpr):
    expert = tl.program_id(0)
    places = tl.arange(0, CHUNK)
    count = tl.zeros([CHUNK], tl.int32)
    for first in range(0, num_pairs, CHUNK):
        pairs = first + places
        chosen = tl.load(experts + pairs, mask=pairs < num_pairs, other=_NOBODY)
        count += (chosen == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(count, 0))


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _place_kernel(
    experts,
    counts,
    order,
    tile_experts,
    num_pairs,
    num_tiles,
    num_experts,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    expert = tl.program_id(0)
    others = tl.arange(0, EXPERTS)
    counted = tl.load(counts + others, mask=others < num_experts, other=0)
    tiles = (counted + ROWS - 1) // ROWS
    first_tile = tl.sum(tl.where(others < expert, tiles, 0), 0)
    own_tiles = tl.sum(tl.where(others == expert, tiles, 0), 0)

    row = first_tile * ROWS
    places = tl.arange(0, CHUNK)
    for first in range(0, num_pairs, CHUNK):
        pairs = first + places
        chosen = tl.load(experts + pairs, mask=pairs < num_pairs, other=_NOBODY)
        mine = (chosen == expert).to(tl.int32)
        tl.store(order + row + tl.cumsum(mine, 0) - 1, pairs, mask=mine > 0)
        row += tl.sum(mine, 0)
    rest = row + tl.arange(0, ROWS)
    behind = (first_tile + own_tiles) * ROWS
    tl.store(order + rest, tl.full([ROWS], _NOBODY, tl.int32), mask=rest < behind)

    end = tl.where(expert == num_experts - 1, num_tiles, first_tile + own_tiles)
    for first in range(first_tile, end, ROWS):
        tile = first + tl.arange(0, ROWS)
        whose = tl.where(tile < first_tile + own_tiles, expert, _NOBODY)
        tl.store(tile_experts + tile, whose, mask=tile < end)


@triton.jit
def _gate_up_kernel(
    x,
    weights,
    out,
    order,
    tile_experts,
    tokens,
    x_t,
    weights_e,
    weights_u,
    out_r,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert >= 0:
        row = tile * ROWS + tl.arange(0, ROWS)
        pair = tl.load(order + row)
        held = pair >= 0
        token = pair // TOP_K if TOP_K else tl.load(tokens + pair, mask=held, other=0)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < INNER
        x_at = x + token.to(tl.int64)[:, None] * x_t
        gate_at = weights + expert * weights_e + columns[None, :] * weights_u
        up_at = gate_at + INNER * weights_u
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, HIDDEN, DEPTH):
            depth = first + tl.arange(0, DEPTH)
            deep = depth < HIDDEN
            x_tile = tl.load(x_at + depth[None, :], mask=held[:, None] & deep[None, :], other=0.0)
            in_weights = deep[:, None] & inside[None, :]
            gates = tl.load(gate_at + depth[:, None], mask=in_weights, other=0.0)
            ups = tl.load(up_at + depth[:, None], mask=in_weights, other=0.0)
            gate += softmax.product(x_tile, gates, UPCAST)
            up += softmax.product(x_tile, ups, UPCAST)
        # exp of a negative number alone, so that no gate overflows.
        shrunk = tl.exp(-tl.abs(gate))
        product = gate * (tl.where(gate >= 0, 1.0, shrunk) / (1.0 + shrunk)) * up
        out_at = out + row[:, None] * out_r + columns[None, :]
        tl.store(out_at, product.to(out.dtype.element_ty), mask=held[:, None] & inside[None, :])


@triton.jit
def _down_kernel(
    inner,
    weights,
    out,
    order,
    tile_experts,
    inner_r,
    weights_e,
    weights_d,
    out_p,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert >= 0:
        row = tile * ROWS + tl.arange(0, ROWS)
        pair = tl.load(order + row)
        held = pair >= 0
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < HIDDEN
        inner_at = inner + row[:, None] * inner_r
        weights_at = weights + expert * weights_e + columns[None, :] * weights_d
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, INNER, DEPTH):
            depth = first + tl.arange(0, DEPTH)
            deep = depth < INNER
            tile_of_inner = tl.load(
                inner_at + depth[None, :], mask=held[:, None] & deep[None, :], other=0.0
            )
            tile_of_weights = tl.load(
                weights_at + depth[:, None], mask=deep[:, None] & inside[None, :], other=0.0
            )
            total += softmax.product(tile_of_inner, tile_of_weights, UPCAST)
        out_at = out + pair.to(tl.int64)[:, None] * out_p + columns[None, :]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=held[:, None] & inside[None, :])


@triton.jit
def _sum_kernel(
    y,
    experts,
    weights,
    out,
    y_p,
    out_t,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < SIZE
    total = tl.zeros([TILE], tl.float32)
    for choice in range(TOP_K):
        pair = token * TOP_K + choice
        value = tl.load(y + pair * y_p + columns, mask=inside, other=0.0).to(tl.float32)
        # What an expert that is not here would have written is undefined.
        value = tl.where(tl.load(experts + pair) >= 0, value, 0.0)
        total += value * tl.load(weights + pair)
    tl.store(out + token * out_t + columns, total, mask=inside)


def experts(
    x_TD: Tensor,
    gate_up_EUD: Tensor,
    down_EDI: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Return what each token's experts make of it, weighted and added in their order: fp32 [T, D].

    A choice of -1 is an expert that is not here, and adds nothing; others are below E.
    """
    tokens, choices = experts_TK.shape
    sum_TD = torch.empty(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    if not sum_TD.numel():
        return sum_TD
    experts_TK, weights_TK = experts_TK.contiguous(), weights_TK.contiguous()
    y_PD = _through(x_TD, gate_up_EUD, down_EDI, experts_TK.view(-1), None, choices, tile)
    size = x_TD.shape[1]
    width = min(_SUM_TILE, padded(size))
    _sum_kernel[(tokens, triton.cdiv(size, width))](
        y_PD,
        experts_TK,
        weights_TK,
        sum_TD,
        y_PD.stride(0),
        sum_TD.stride(0),
        TOP_K=choices,
        SIZE=size,
        TILE=width,
    )
    return sum_TD


def expert_pairs(
    x_TD: Tensor,
    gate_up_EUD: Tensor,
    down_EDI: Tensor,
    tokens_P: Tensor,
    experts_P: Tensor,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Return what each pair's expert makes of its token, [P, D]; zeros where the expert is -1."""
    if not len(tokens_P) or not x_TD.shape[1]:
        return x_TD.new_zeros(len(tokens_P), x_TD.shape[1])
    experts_P, tokens_P = experts_P.contiguous(), tokens_P.contiguous()
    y_PD = _through(x_TD, gate_up_EUD, down_EDI, experts_P, tokens_P, 0, tile)
    return y_PD.masked_fill_(experts_P[:, None] < 0, 0.0)


@dataclass(frozen=True)
class Placed:
    """Pairs by expert: `order` has those of each row, -1 for nobody; `tile_experts` each tile's.

    A tile whose expert is -1 is nobody's.
    """

    order: Tensor
    tile_experts: Tensor


def place(experts_P: Tensor, num_experts: int, rows: int) -> Placed:
    """Sort pairs by expert into tiles of so many rows, without waiting for the device."""
    pairs = len(experts_P)
    # Each expert that anybody chose leaves a part of one tile empty at most.
    tiles = pairs // rows + min(pairs, num_experts)
    counts = torch.empty(num_experts, dtype=torch.int32, device=experts_P.device)
    order = counts.new_empty(tiles * rows)
    tile_experts = counts.new_empty(tiles)
    _count_kernel[(num_experts,)](experts_P, counts, pairs, CHUNK=_CHUNK)
    _place_kernel[(num_experts,)](
        experts_P,
        counts,
        order,
        tile_experts,
        pairs,
        tiles,
        num_experts,
        ROWS=rows,
        EXPERTS=padded(num_experts),
        CHUNK=_CHUNK,
    )
    return Placed(order, tile_experts)


def apart(experts_P: Tensor, rows: int) -> Placed:
    """Give each pair a tile of its own: of one token, whose experts differ, that is each's place.

    Nothing is launched, which would take as long as the products of a few rows.
    """
    return Placed(_first_rows(len(experts_P), rows, experts_P.device), experts_P)


@functools.cache
def _first_rows(pairs: int, rows: int, device: torch.device) -> Tensor:
    order = torch.full((pairs, rows), _NOBODY.value, dtype=torch.int32)
    order[:, 0] = torch.arange(pairs)
    return order.view(-1).to(device)


def _through(
    x_TD: Tensor,
    gate_up_EUD: Tensor,
    down_EDI: Tensor,
    experts_P: Tensor,
    tokens_P: Tensor | None,
    choices: int,
    tile: Tile | None,
) -> Tensor:
    """Return each pair's result, [P, D] in the dtype of x; undefined where the expert is -1."""
    check_rows(x_TD, gate_up_EUD, down_EDI)
    num_experts, hidden, inner = down_EDI.shape
    if gate_up_EUD.shape != (num_experts, 2 * inner, hidden) or x_TD.shape[1] != hidden:
        raise ValueError(
            f"rows of {x_TD.shape[1]} for experts of {tuple(gate_up_EUD.shape)} and "
            f"{tuple(down_EDI.shape)}: [E, 2I, D] and [E, D, I] must fit rows of D"
        )
    tile = tile or tuned(x_TD.device, choices_of(x_TD, num_experts, inner, len(experts_P)))
    if choices == len(experts_P):
        placed = apart(experts_P, tile.rows)
    else:
        placed = place(experts_P, num_experts, tile.rows)
    inner_RI = x_TD.new_empty(len(placed.order), inner)
    y_PD = x_TD.new_empty(len(experts_P), hidden)
    tiles = len(placed.tile_experts)
    shape = {
        "HIDDEN": hidden,
        "INNER": inner,
        "ROWS": tile.rows,
        "COLUMNS": tile.keys,
        "DEPTH": _DEPTH,
        "UPCAST": INTERPRETED,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    check_grid(triton.cdiv(max(inner, hidden), tile.keys), "columns of a tile")
    _gate_up_kernel[(tiles, triton.cdiv(inner, tile.keys))](
        x_TD,
        gate_up_EUD,
        inner_RI,
        placed.order,
        placed.tile_experts,
        placed.order if tokens_P is None else tokens_P,
        x_TD.stride(0),
        *gate_up_EUD.stride()[:2],
        inner_RI.stride(0),
        TOP_K=choices,
        **shape,
    )
    _down_kernel[(tiles, triton.cdiv(hidden, tile.keys))](
        inner_RI,
        down_EDI,
        y_PD,
        placed.order,
        placed.tile_experts,
        inner_RI.stride(0),
        *down_EDI.stride()[:2],
        y_PD.stride(0),
        **shape,
    )
    return y_PD


def choices_of(x_TD: Tensor, num_experts: int, inner: int, pairs: int) -> Choices:
    """Return the tiles for so many pairs: about as many rows as an expert has pairs.

    A tile of rows and one each of gates and ups, in all stages, must fit a multiprocessor's shared
    memory.
    """
    most = most_of(x_TD.dtype)
    rows = min(_MOST_ROWS, most, max(_LEAST_ROWS, padded(pairs // num_experts)))
    shapes = _WIDE if rows >= _MANY_ROWS else _NARROW
    tiles = [Tile(rows=rows, keys=k, warps=w, stages=s) for k, w, s in shapes if k <= 4 * most]
    row_bytes = _DEPTH * x_TD.element_size()
    fitting = [t for t in tiles if (t.rows + 2 * t.keys) * t.stages * row_bytes <= SHARED_BYTES]
    return Choices(name=bucket("experts", x_TD.dtype, inner, rows, pairs), tiles=fitting)
