"""Copies between a rank's cache memory and payloads, or another memory.

Owns the payload's order and the arithmetic from global coordinates to bytes. Knows nothing of
grants: callers have checked that a copy is allowed.

Shapes: L layers, P planes (K and V), B blocks, N KV heads, S block size, D head size; U units of
`unit` tokens. Memory is [L, P, B, N, S, D]; a payload is [L, P, U, N, unit, D], so that with equal
block sizes whole blocks move as they lie.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from isal.isal_zlib import crc32

from kvtransfer.addresses import BlockTable, Memory
from kvtransfer.layout import Box, KVLayout
from kvtransfer.runs import Cuts, Units, copy_runs, crc_runs, extents

# Elements are only moved, never computed with; numpy has no bfloat16, so their bits travel as
# integers. numpy rather than torch: its copies release the GIL and never start an OpenMP team
# beside the model's.
_BITS: dict[str, tuple[torch.dtype, torch.dtype, type[np.generic]]] = {
    "bfloat16": (torch.bfloat16, torch.int16, np.int16),
    "float16": (torch.float16, torch.int16, np.int16),
    "float32": (torch.float32, torch.int32, np.int32),
}
# Beyond this many separate extents numpy's own loop over an index is cheaper than a copy for each.
_MANY_EXTENTS = 12
# Reading by an index makes a temporary, which for larger extents costs more than the loop saves.
_SMALL_BYTES = 32 << 10

Array = npt.NDArray[Any]


def element_type(dtype: str) -> type[np.generic]:
    """Return numpy's type for the bits of an element."""
    return _BITS[dtype][2]


def bits_type(dtype: str) -> torch.dtype:
    """Return torch's type for the bits of an element."""
    return _BITS[dtype][1]


def bits_of(memory: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """Return the memory as the integers that are moved; ValueError for another element type."""
    torch_type, bits_type, _ = _BITS[layout.shape.dtype]
    if memory.dtype not in (torch_type, bits_type):
        raise ValueError(f"KV memory is {memory.dtype}; the layout says {layout.shape.dtype}")
    return memory.detach().view(bits_type)


class KVMemory(Memory):
    """See Memory: the host's own, whose bytes move as they lie where runs are long."""

    def __init__(self, memory: torch.Tensor, layout: KVLayout, rank: int) -> None:
        """Wrap host memory [L, P, B, N, S, D] without copying.

        N, S and D must be contiguous among themselves; L, P and B may have strides. Raises
        ValueError where the memory does not fit the layout.
        """
        if memory.device.type != "cpu":
            raise ValueError(f"KV memory must be host memory, found {memory.device}")
        self._wrap(bits_of(memory, layout).numpy(), layout, rank)

    @classmethod
    def from_numpy(cls, array: Array, layout: KVLayout, rank: int) -> "KVMemory":
        """Wrap the bits of a memory, of `element_type`, to read from only; raises as `__init__`."""
        element = element_type(layout.shape.dtype)
        if array.dtype != element:
            raise ValueError(f"KV memory is {array.dtype}; the bits of the layout's are {element}")
        bits = array.view()
        bits.flags.writeable = False
        memory = cls.__new__(cls)
        memory._wrap(bits, layout, rank)
        return memory

    def _wrap(self, kv: Array, layout: KVLayout, rank: int) -> None:
        check_shape(kv.shape, layout, rank)
        super().__init__(layout, rank, kv.shape[2])
        _check_strides(kv)
        self._kv = kv
        self._bytes = _flat(kv)
        self._head_bytes = layout.block_size * layout.shape.head_size * kv.itemsize
        of_layer, of_plane = (np.arange(kv.shape[i]) * kv.strides[i] for i in (0, 1))
        self._planes_LP = np.add.outer(of_layer, of_plane)

    def run_bytes(self, box: Box) -> int:
        """See Memory."""
        block_size = self._layout.block_size
        heads = len(box.heads) if box.unit == block_size else 1
        return self._head_bytes * heads * box.unit // block_size

    def views(self, table: BlockTable, box: Box) -> list[memoryview]:
        """See Memory."""
        flat = self._bytes
        begins, ends = self._cuts(table, box)
        return [flat[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]

    def crc(self, table: BlockTable, box: Box, crc: int) -> int:
        """See Memory."""
        return crc_runs(self._bytes, self._cuts(table, box), crc)

    def _cuts(self, table: BlockTable, box: Box) -> Cuts:
        """Return where the box's runs begin and end, in bytes of the memory, in payload order."""
        if box.part:
            raise ValueError(f"tokens {box.tokens} do not fill their last unit of {box.unit}")
        begins = self._begins(self._units(table, box), box)
        run = self.run_bytes(box)
        (lasts,) = (begins[1:] - begins[:-1] != run).nonzero()
        ends = begins[np.append(lasts, len(begins) - 1)] + run
        return begins[np.append(0, lasts + 1)], ends

    def _begins(self, units: Units, box: Box) -> npt.NDArray[np.int64]:
        """Return the first byte of each of the box's runs of `run_bytes`, in payload order."""
        layers, heads = self._own(box)
        begins_LP = self._planes_LP[layers].reshape(-1, 1)
        begins_UN = units.blocks * self._kv.strides[2]
        if units.ratio == 1:
            begins_UN += heads.start * self._head_bytes
        else:
            begins_UN += units.subs * (self._head_bytes // units.ratio)
            begins_N = np.arange(heads.start, heads.stop) * self._head_bytes
            begins_UN = (begins_UN.reshape(-1, 1) + begins_N).reshape(-1)
        begins: npt.NDArray[np.int64] = (begins_LP + begins_UN).reshape(-1)
        return begins

    def pack(self, payload: npt.NDArray[np.uint8], table: BlockTable, box: Box) -> None:
        """See Memory."""
        out = payload.view(self._kv.dtype).reshape(self._payload_shape(box))
        units, kv = self._units(table, box), self._split(box, box.unit)
        parts = extents(units)
        if len(parts) > _MANY_EXTENTS and len(payload) < _SMALL_BYTES * len(parts):
            out[...] = kv[:, :, units.blocks, units.subs]
        else:
            for begin, end in parts:
                out[:, :, begin:end] = units.slab(kv, begin, end)
        if box.part:
            out[:, :, -1, :, box.part :] = 0

    def scatter(self, payload: npt.NDArray[np.uint8], table: BlockTable, box: Box) -> None:
        """See Memory."""
        data = payload.view(self._kv.dtype).reshape(self._payload_shape(box))
        units, kv = self._units(table, box), self._split(box, box.unit)
        parts = extents(units)
        if len(parts) > _MANY_EXTENTS:
            kv[:, :, units.blocks, units.subs] = data
        else:
            for begin, end in parts:
                units.slab(kv, begin, end)[...] = data[:, :, begin:end]
        self.clear_rest(table, box)

    def copy_from(
        self,
        source: "KVMemory",
        source_table: BlockTable,
        table: BlockTable,
        box: Box,
        crc: int | None = None,
    ) -> int | None:
        """See Memory."""
        if self._bytes.readonly:
            raise ValueError("this memory is read-only: it cannot be copied into")
        if box.part:
            payload = np.empty(self.payload_bytes(box), np.uint8)
            source.pack(payload, source_table, box)
            self.scatter(payload, table, box)
            return None if crc is None else crc32(payload, crc)
        into, out = self._cuts(table, box), source._cuts(source_table, box)
        crc = copy_runs(self._bytes, into, source._bytes, out, crc)
        self.clear_rest(table, box)
        return crc

    def clear_rest(self, table: BlockTable, box: Box) -> None:
        """See Memory."""
        rest = self._rest(table, box.tokens)
        if rest is not None:
            block, used = rest
            self._split(box, self._layout.block_size)[:, :, block, 0, :, used:] = 0

    def _split(self, box: Box, unit: int) -> Array:
        """Return the view [L, P, B, units of a block, N, unit, D] of a box's layers and heads."""
        layers, heads = self._own(box)
        kv = self._kv[layers]
        count, planes, blocks, all_heads, block_size, size = kv.shape
        # Splitting one axis never copies, whatever the strides.
        split = kv.reshape(count, planes, blocks, all_heads, block_size // unit, unit, size)
        return split.transpose(0, 1, 2, 4, 3, 5, 6)[:, :, :, :, heads]


def sizes_of(layout: KVLayout, rank: int, blocks: int) -> tuple[int, int, int, int, int, int]:
    """Return the sizes of a rank's memory of so many blocks."""
    shape, shard = layout.shape, layout.shard(rank)
    heads = len(shard.heads)
    return len(shard.layers), shape.planes, blocks, heads, layout.block_size, shape.head_size


def check_shape(found: Sequence[int], layout: KVLayout, rank: int) -> None:
    """Raise ValueError where a memory does not have a rank's sizes."""
    if len(found) != 6 or tuple(found) != sizes_of(layout, rank, found[2]):
        want = sizes_of(layout, rank, -1)
        raise ValueError(f"KV memory is {tuple(found)}; rank {rank} of the layout needs {want}")


def _check_strides(kv: Array) -> None:
    """Raise ValueError for strides that `_flat` or a block's runs do not allow."""
    inner = kv.itemsize
    for axis in (5, 4, 3):
        if kv.shape[axis] > 1 and kv.strides[axis] != inner:
            raise ValueError(f"KV memory's heads, tokens and elements lie apart: {kv.strides}")
        inner *= kv.shape[axis]
    for stride, count in sorted((kv.strides[i], kv.shape[i]) for i in range(3) if kv.shape[i] > 1):
        if stride < inner:
            raise ValueError(f"KV memory's blocks overlap or run backwards: {kv.strides}")
        inner = stride * (count - 1) + inner


def _flat(kv: Array) -> memoryview:
    """Return all bytes from the first element to the last, also what lies between blocks."""
    last = sum(stride * (count - 1) for stride, count in zip(kv.strides, kv.shape, strict=True))
    flat = np.lib.stride_tricks.as_strided(
        kv, (last // kv.itemsize + 1,), (kv.itemsize,), writeable=kv.flags.writeable
    )
    return memoryview(flat.view(np.uint8).data)
