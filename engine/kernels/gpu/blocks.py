"""Copies any number of blocks of a cache to their places in another memory, in one launch.

Owns no memory. Either may be the host's, if it is locked: the GPU then reads or writes it itself.
Legend: L layers, C planes (keys, values), B blocks, U blocks to be copied. Elements are moved as
the bits they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.runtime import check_grid, padded

_TILE = 4096
_AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["first_plane"])
def _blocks_kernel(
    target,
    source,
    blocks,
    first_plane,
    PLANE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copy a tile of one block of one plane; both memories are contiguous."""
    block = tl.load(blocks + tl.program_id(0)).to(tl.int64)
    plane = tl.program_id(1).to(tl.int64) + first_plane
    at = tl.program_id(2) * TILE + tl.arange(0, TILE)
    inside = at < BLOCK
    begin = plane * PLANE + block * BLOCK
    tl.store(target + begin + at, tl.load(source + begin + at, mask=inside), mask=inside)


def copy_blocks(target: Tensor, source: Tensor, layers: range, blocks_U: Tensor) -> None:
    """Copy blocks of some layers between contiguous memories of one shape, [L, C, B, ...].

    `layers` go one by one, from 0; `blocks_U` are int32, on the device.
    """
    check_memories(target, source)
    planes, count = target.shape[1:3]
    size = target[0, 0, 0].numel()
    if not len(layers) or not len(blocks_U) or not size:
        return
    bits = _AS_BITS[target.element_size()]
    tile = min(_TILE, padded(size))
    tiles = triton.cdiv(size, tile)
    check_grid(max(len(layers) * planes, tiles), "planes of layers, or tiles of a block")
    _blocks_kernel[(len(blocks_U), len(layers) * planes, tiles)](
        target.view(bits),
        source.view(bits),
        blocks_U,
        layers.start * planes,
        PLANE=count * size,
        BLOCK=size,
        TILE=tile,
        num_warps=4,
    )


def check_memories(target: Tensor, source: Tensor) -> None:
    """Raise ValueError where blocks of one have no like place in the other."""
    alike = target.shape == source.shape and target.dtype == source.dtype
    if not alike or not target.is_contiguous() or not source.is_contiguous():
        raise ValueError(
            f"blocks of {tuple(source.shape)} in {source.dtype} for {tuple(target.shape)} in "
            f"{target.dtype}: both must be contiguous and alike"
        )
