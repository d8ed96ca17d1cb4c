"""Moves cached keys and values between caches, and to and from a transfer's payload.

Owns no memory, no plan, no wire. Legend: L layers, C planes (keys, values), B blocks, G KV heads of
a cache, N those of the box, P places of a block, U units, Q tokens of a unit, H head size. A unit
is a block or a part of one; a payload is [L, C, U, N, Q, H], see kvtransfer.memory: as a cache with
a block for each unit of the box. Elements are moved as the bits they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.options import Units
from engine.kernels.gpu.runtime import check_grid, padded

_TILE = 2048
_AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _run_of(memory, blocks, subs, unit, head, layer, plane, m_l, m_c, m_b, m_g, LENGTH, IN_ORDER):
    """Return where a memory has one head's run of LENGTH elements of a unit."""
    block = unit.to(tl.int64)
    place = block * 0
    if not IN_ORDER:
        block = tl.load(blocks + unit).to(tl.int64)
        place = tl.load(subs + unit).to(tl.int64)
    return memory + layer * m_l + plane * m_c + block * m_b + head * m_g + place * LENGTH


@triton.jit(do_not_specialize=["into_head", "from_head", "tokens"])
def _move_kernel(
    into,
    into_blocks,
    into_subs,
    into_l,
    into_c,
    into_b,
    into_g,
    into_head,
    source,
    from_blocks,
    from_subs,
    from_l,
    from_c,
    from_b,
    from_g,
    from_head,
    tokens,
    PLANES: tl.constexpr,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    INTO_ORDER: tl.constexpr,
    FROM_ORDER: tl.constexpr,
):
    """Move one run: a unit of one head, plane and layer, contiguous on both sides."""
    unit = tl.program_id(0) // HEADS
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    layer = (tl.program_id(1) // PLANES).to(tl.int64)
    plane = (tl.program_id(1) % PLANES).to(tl.int64)
    LENGTH: tl.constexpr = UNIT * SIZE
    into = _run_of(
        into, into_blocks, into_subs, unit, into_head + head, layer, plane,
        into_l, into_c, into_b, into_g, LENGTH, INTO_ORDER,
    )  # fmt: skip
    source = _run_of(
        source, from_blocks, from_subs, unit, from_head + head, layer, plane,
        from_l, from_c, from_b, from_g, LENGTH, FROM_ORDER,
    )  # fmt: skip
    for first in range(0, LENGTH, TILE):
        at = first + tl.arange(0, TILE)
        inside = at < LENGTH
        # Behind the last token is what another sequence left, or the sender: it is made zero.
        held = inside & (unit * UNIT + at // SIZE < tokens)
        tl.store(into + at, tl.load(source + at, mask=held, other=0), mask=inside)


def move(
    into: Tensor, source: Tensor, to: Units | None, at: Units | None, unit: int, tokens: int
) -> None:
    """Write a box, where it is `at` in one memory, to where it belongs in another.

    None for a payload's place. What lies behind the last token of the last unit becomes zero,
    whatever was there. The device of the one memory has to reach the other.
    """
    heads, units = check_box(into, source, to, at, unit, tokens)
    layers, planes, *_, size = into.shape
    if not into.numel() or not units or not heads:
        return
    check_grid(layers * planes, "layers and planes")
    bits = _AS_BITS[into.element_size()]
    _move_kernel[(units * heads, layers * planes)](
        into.view(bits),
        *_place(into, to),
        source.view(bits),
        *_place(source, at),
        tokens,
        PLANES=planes,
        HEADS=heads,
        UNIT=unit,
        SIZE=size,
        TILE=min(_TILE, padded(unit * size)),
        INTO_ORDER=to is None,
        FROM_ORDER=at is None,
        num_warps=4,
    )


def _place(memory: Tensor, box: Units | None) -> tuple[Tensor | int, ...]:
    """Return a memory's arguments of the kernel; a payload's indices are not looked at."""
    if box is None:
        return memory, memory, *memory.stride()[:4], 0
    return box.blocks_U, box.subs_U, *memory.stride()[:4], box.heads.start


def check_box(
    into: Tensor, source: Tensor, to: Units | None, at: Units | None, unit: int, tokens: int
) -> tuple[int, int]:
    """Return how many heads and units a box has.

    Raises ValueError where it does not fit the memories, or they do not go together.
    """
    if into.dtype != source.dtype or into.shape[:2] != source.shape[:2]:
        raise ValueError(
            f"{tuple(into.shape)} in {into.dtype} from {tuple(source.shape)} in {source.dtype}: "
            "layers, planes and types must be alike"
        )
    sizes = {_checked(memory, box, unit) for memory, box in ((into, to), (source, at))}
    if len(sizes) != 1:
        raise ValueError(f"boxes of {sizes} (heads, units, elements) must be alike")
    ((heads, units, _),) = sizes
    if -(-tokens // unit) != units:
        raise ValueError(f"{tokens} tokens in {units} units of {unit}: as many as they need")
    return heads, units


def _checked(memory: Tensor, box: Units | None, unit: int) -> tuple[int, int, int]:
    """Return how many heads, units and elements of a head a memory's part of a box has."""
    blocks, heads, places, size = memory.shape[2:]
    if memory.stride(5) != 1 or memory.stride(4) != size:
        raise ValueError("each head of a block, or of a unit, must be contiguous")
    if places % unit or (box is None and places != unit):
        raise ValueError(
            f"units of {unit} tokens must divide blocks of {places}, or be a payload's"
        )
    if box is None:
        return heads, blocks, size
    if not 0 <= box.heads.start <= box.heads.stop <= heads:
        raise ValueError(f"heads {box.heads.start} to {box.heads.stop} of {heads}")
    return box.heads.stop - box.heads.start, len(box.blocks_U), size
