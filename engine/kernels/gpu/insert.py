"""Norm and rotation of new tokens' heads, and their way into the paged cache, in one launch.

Owns no memory. Legend: T tokens, N query heads, G KV heads, X = 2G (the K heads, then the V heads),
Y = N + X, M heads that are normalised and rotated, H head size.

A head is read as two halves, each element once and by who writes it, so that heads can be turned
where they lie.
"""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.runtime import check_grid, check_rows, padded
from engine.kernels.rows import NormWeight

_HEADS = 8  # of a program


@triton.jit
def _turned(low, high, weight_at, loaded, cos, sin, floor_squared, HALF: tl.constexpr):
    """Return both halves of fp32 heads, normalised, unless the floor is below 0, and rotated."""
    squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
    length = tl.sqrt(tl.where(floor_squared < 0, 1.0, squares + floor_squared))[:, None]
    low = low / length * tl.load(weight_at, mask=loaded, other=0.0)
    high = high / length * tl.load(weight_at + HALF, mask=loaded, other=0.0)
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _insert_kernel(
    x,
    weight,
    cos,
    sin,
    cells,
    slots,
    x_t,
    x_y,
    weight_m,
    cos_t,
    sin_t,
    cells_c,
    slots_t,
    num_cells,
    floor_squared,
    ALL: tl.constexpr,
    TURNED: tl.constexpr,
    FIRST: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    INSERTS: tl.constexpr,
):
    """Turn the first TURNED of ALL heads in place; write those from FIRST on to their cells."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, TILE)
    inside = (heads[:, None] < ALL) & (half[None, :] < HALF)
    at = x + token * x_t + heads[:, None] * x_y + half[None, :]
    low = tl.load(at, mask=inside, other=0.0)
    high = tl.load(at + HALF, mask=inside, other=0.0)
    if TURNED > 0:
        # Heads behind these keep the bits they have.
        turns = inside & (heads[:, None] < TURNED)
        in_half = half < HALF
        # The table has each angle twice; its sines are negative in the first half only.
        cosines = tl.load(cos + token * cos_t + half, mask=in_half, other=0.0)[None, :]
        sines = tl.load(sin + token * sin_t + HALF + half, mask=in_half, other=0.0)[None, :]
        weight_at = weight + heads[:, None] * weight_m + half[None, :]
        wide_low, wide_high = _turned(
            low.to(tl.float32),
            high.to(tl.float32),
            weight_at,
            turns,
            cosines,
            sines,
            floor_squared,
            HALF,
        )
        low = tl.where(turns, wide_low.to(low.dtype), low)
        high = tl.where(turns, wide_high.to(high.dtype), high)
        tl.store(at, low, mask=turns)
        tl.store(at + HALF, high, mask=turns)
    if INSERTS:
        kept = (heads >= FIRST) & (heads < ALL)
        cell = tl.load(slots + token * slots_t + heads - FIRST, mask=kept, other=-1).to(tl.int64)
        # A slot that is none: a row of padding, or a mistake that must not reach other memory.
        kept = kept & (cell >= 0) & (cell < num_cells)
        into = cells + cell[:, None] * cells_c + half[None, :]
        tl.store(into, low.to(cells.dtype.element_ty), mask=inside & kept[:, None])
        tl.store(into + HALF, high.to(cells.dtype.element_ty), mask=inside & kept[:, None])


def rotate_insert(
    qkv_TYH: Tensor,
    norm: NormWeight,
    cos_T1H: Tensor,
    sin_T1H: Tensor,
    cells: Tensor,
    slots_TX: Tensor,
) -> None:
    """Normalise and turn the query and key heads in place; write keys and values to the cache.

    `norm.weight` has a row for each head that is turned, [N + G, H]. Heads whose slot is no row of
    `cells` are turned but not written.
    """
    num_kv_heads = slots_TX.shape[1] // 2
    turned = qkv_TYH.shape[1] - num_kv_heads
    if norm.weight.shape != (turned, qkv_TYH.shape[2]):
        raise ValueError(
            f"a norm of {tuple(norm.weight.shape)} for {turned} heads of {qkv_TYH.shape[2]}; "
            "it needs a row for each query and key head"
        )
    _launch(qkv_TYH, turned, (norm, cos_T1H, sin_T1H), (cells, slots_TX))


def norm_rotate(x_TMH: Tensor, norm: NormWeight, cos_T1H: Tensor, sin_T1H: Tensor) -> None:
    """See `RowKernels`."""
    _launch(x_TMH, x_TMH.shape[1], (norm, cos_T1H, sin_T1H), None)


def insert(cells: Tensor, slots_TX: Tensor, x_TXH: Tensor) -> None:
    """Write heads to the rows [.., H] that slots name; what names no row is left out."""
    _launch(x_TXH, 0, None, (cells, slots_TX))


def _launch(
    x_TYH: Tensor,
    turned: int,
    turn: tuple[NormWeight, Tensor, Tensor] | None,
    into: tuple[Tensor, Tensor] | None,
) -> None:
    tokens, heads, size = x_TYH.shape
    if size % 2:
        raise ValueError(f"heads of {size} elements have no halves: the size must be even")
    if not tokens or not heads:
        return
    # Where a part is left out its pointers are not followed; x stands in for them.
    weight, cos, sin, floor_squared = x_TYH, x_TYH, x_TYH, 0.0
    weight_m = 0
    if turn is not None:
        norm, cos, sin = turn
        weight, floor_squared = norm.weight, norm.floor_squared
        weight_m = weight.stride(0) if weight.dim() == 2 else 0
    cells, slots = (x_TYH, x_TYH) if into is None else into
    check_rows(x_TYH, weight, cos, sin, cells, slots)
    held = min(_HEADS, padded(heads))
    blocks = triton.cdiv(heads, held)
    check_grid(blocks, "groups of heads")
    _insert_kernel[(tokens, blocks)](
        x_TYH,
        weight,
        cos,
        sin,
        cells,
        slots,
        x_TYH.stride(0),
        x_TYH.stride(1),
        weight_m,
        cos.stride(0),
        sin.stride(0),
        cells.stride(0),
        slots.stride(0),
        len(cells),
        floor_squared,
        ALL=heads,
        TURNED=turned,
        FIRST=heads - (0 if into is None else slots.shape[1]),
        HALF=size // 2,
        TILE=padded(size // 2),
        HEADS=held,
        INSERTS=into is not None,
        num_warps=4,
    )
