"""Moves cached keys and values to and from a transfer's payload. Owns no memory, no plan, no wire.

Legend: L layers, C planes (keys, values), B blocks, G KV heads of the cache, N those of the box, P
places of a block, U units, Q tokens of a unit, H head size. A unit is a block or a part of one; a
payload is [L, C, U, N, Q, H], see kvtransfer.memory. Elements are moved as the bits they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.runtime import check_grid, padded

_TILE = 2048
_AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _move_kernel(
    cache,
    payload,
    blocks,
    subs,
    cache_l,
    cache_c,
    cache_b,
    cache_g,
    first_head,
    tokens,
    PLANES: tl.constexpr,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PACKS: tl.constexpr,
):
    """Move one run: a unit of one head, plane and layer, contiguous on both sides."""
    unit = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    plane_row = tl.program_id(1)
    layer = (plane_row // PLANES).to(tl.int64)
    plane = (plane_row % PLANES).to(tl.int64)
    block = tl.load(blocks + unit).to(tl.int64)
    place = tl.load(subs + unit).to(tl.int64) * UNIT
    run = layer * cache_l + plane * cache_c + block * cache_b + (first_head + head) * cache_g
    cache += run + place * SIZE
    payload += (plane_row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (UNIT * SIZE)
    for first in range(0, UNIT * SIZE, TILE):
        at = first + tl.arange(0, TILE)
        inside = at < UNIT * SIZE
        # Behind the last token is what another sequence left, or the sender: it is made zero.
        held = inside & (unit * UNIT + at // SIZE < tokens)
        if PACKS:
            tl.store(payload + at, tl.load(cache + at, mask=held, other=0), mask=inside)
        else:
            tl.store(cache + at, tl.load(payload + at, mask=held, other=0), mask=inside)


def pack(
    cache_LCBGPH: Tensor,
    payload: Tensor,
    blocks_U: Tensor,
    subs_U: Tensor,
    heads: slice,
    unit: int,
    tokens: int,
) -> None:
    """Write a box to `payload`, [L, C, U, N, Q, H]; what lies behind its tokens is zero.

    Unit u is the part `subs_U[u]` of block `blocks_U[u]`.
    """
    _move(cache_LCBGPH, payload, blocks_U, subs_U, heads, unit, tokens, packs=True)


def unpack(
    cache_LCBGPH: Tensor,
    payload: Tensor,
    blocks_U: Tensor,
    subs_U: Tensor,
    heads: slice,
    unit: int,
    tokens: int,
) -> None:
    """Write a payload to its blocks; the rest of the last unit becomes zero, whatever was sent."""
    _move(cache_LCBGPH, payload, blocks_U, subs_U, heads, unit, tokens, packs=False)


def _move(
    cache: Tensor,
    payload: Tensor,
    blocks_U: Tensor,
    subs_U: Tensor,
    heads: slice,
    unit: int,
    tokens: int,
    *,
    packs: bool,
) -> None:
    layers, planes, *_, size = cache.shape
    num_heads, units = heads.stop - heads.start, len(blocks_U)
    check_box(cache, payload, (layers, planes, units, num_heads, unit, size), tokens)
    if not payload.numel():
        return
    check_grid(layers * planes, "layers and planes")
    bits = _AS_BITS[cache.element_size()]
    _move_kernel[(units * num_heads, layers * planes)](
        cache.view(bits),
        payload.view(bits),
        blocks_U,
        subs_U,
        *cache.stride()[:4],
        heads.start,
        tokens,
        PLANES=planes,
        HEADS=num_heads,
        UNIT=unit,
        SIZE=size,
        TILE=min(_TILE, padded(unit * size)),
        PACKS=packs,
        num_warps=4,
    )


def check_box(cache: Tensor, payload: Tensor, shape: tuple[int, ...], tokens: int) -> None:
    """Raise ValueError where a payload or a cache does not fit a box of this shape."""
    unit, size = shape[4:]
    units = shape[2]
    if tuple(payload.shape) != shape or payload.dtype != cache.dtype:
        raise ValueError(
            f"a payload of {tuple(payload.shape)} in {payload.dtype} for a box of {shape} in "
            f"{cache.dtype}: they must be alike"
        )
    if not payload.is_contiguous() or cache.stride(5) != 1 or cache.stride(4) != size:
        raise ValueError("a payload, and each head of a block in the cache, must be contiguous")
    if cache.shape[4] % unit or -(-tokens // unit) != units:
        raise ValueError(
            f"{tokens} tokens in {units} units of {unit} for blocks of {cache.shape[4]}: units "
            "must divide a block, and be as many as the tokens need"
        )
