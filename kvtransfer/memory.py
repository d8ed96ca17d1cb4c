"""Copies between a rank's cache memory and payloads, or another memory.

Owns the payload's order and the arithmetic from global coordinates to bytes. Knows nothing of
grants: callers have checked that a copy is allowed.

Shapes: L layers, P planes (K and V), B blocks, N KV heads, S block size, D head size; U units of
`unit` tokens. Memory is [L, P, B, N, S, D]; a payload is [L, P, U, N, unit, D], so that with equal
block sizes whole blocks move as they lie. A box is some layers, heads and tokens of one sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from isal.isal_zlib import crc32

from kvtransfer.layout import CacheLayout, KVLayout, Span
from kvtransfer.runs import Cuts, Units, copy_runs, crc_runs, extents, units_of

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


@dataclass(frozen=True, slots=True, eq=False)
class BlockTable:
    """One sequence's blocks on this rank, in the order of the tokens that the rank holds."""

    ids: npt.NDArray[np.int64]
    held: tuple[Span, ...]

    def local(self, token: int) -> int:
        """Return where a global token stands among the tokens that this rank holds."""
        before = 0
        for span in self.held:
            if span.begin <= token <= span.end:
                return before + token - span.begin
            before += len(span)
        raise ValueError(f"token {token} is not held by this rank")

    def blocks_of(self, tokens: Span, block_size: int) -> list[int]:
        """Return the blocks that have some of these global tokens, held in a row."""
        begin = self.local(tokens.begin)
        found: list[int] = self.ids[
            begin // block_size : -(-(begin + len(tokens)) // block_size)
        ].tolist()
        return found


class KVMemory:
    """One rank's memory of one cache group, addressed by global layers, heads and tokens."""

    def __init__(self, memory: torch.Tensor, layout: KVLayout, rank: int) -> None:
        """Wrap host memory [L, P, B, N, S, D] without copying.

        N, S and D must be contiguous among themselves; L, P and B may have strides. Raises
        ValueError where the memory does not fit the layout.
        """
        torch_type, bits_type, _ = _BITS[layout.shape.dtype]
        if memory.dtype != torch_type:
            raise ValueError(f"KV memory is {memory.dtype}; the layout says {layout.shape.dtype}")
        if memory.device.type != "cpu":
            raise ValueError(f"KV memory must be host memory, found {memory.device}")
        self._wrap(memory.detach().view(bits_type).numpy(), layout, rank)

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
        shape, shard = layout.shape, layout.shard(rank)
        heads, size = len(shard.heads), shape.head_size
        want = (len(shard.layers), shape.planes, -1, heads, layout.block_size, size)
        if kv.ndim != 6 or any(w not in (-1, f) for w, f in zip(want, kv.shape, strict=True)):
            raise ValueError(f"KV memory is {kv.shape}; rank {rank} of the layout needs {want}")
        if not kv.size:
            raise ValueError(f"KV memory {kv.shape} has no blocks")
        _check_strides(kv)
        self._kv = kv
        self._layout = layout
        self._shard = shard
        self._bytes = _flat(kv)
        self._head_bytes = layout.block_size * size * kv.itemsize
        of_layer, of_plane = (np.arange(kv.shape[i]) * kv.strides[i] for i in (0, 1))
        self._planes_LP = np.add.outer(of_layer, of_plane)

    @property
    def blocks(self) -> int:
        """Number of blocks in the memory."""
        return int(self._kv.shape[2])

    def table(
        self, block_ids: Sequence[int], total_tokens: int, cp_first: int | None = None
    ) -> BlockTable:
        """Check a sequence's block ids (of the tokens this rank holds) and make them a table.

        Its first share lies on cp rank `cp_first`, where that is not the memory's layout's.
        Where a window has left blocks behind, any ids of the memory may stand in their places.
        Raises ValueError for ids out of range, ids given twice, or too few of them.
        """
        layout = self._layout
        if cp_first is not None and cp_first != layout.cp_first:
            layout = replace(layout, cp_first=cp_first)
        held = layout.tokens_of(self._shard, total_tokens)
        ids = np.asarray(block_ids, dtype=np.int64)
        need = sum(-(-len(span) // layout.block_size) for span in held)
        if ids.ndim != 1 or len(ids) < need:
            raise ValueError(f"{len(block_ids)} blocks for {total_tokens} tokens, need {need}")
        if len(ids) and (ids.min() < 0 or ids.max() >= self.blocks):
            raise ValueError(f"block ids reach beyond the memory's {self.blocks} blocks")
        behind = Span(0, layout.window_begin(total_tokens))
        used = ids[sum(len(span.meet(behind)) for span in held) // layout.block_size :]
        if len(np.unique(used)) != len(used):
            raise ValueError("a block id is given twice")
        return BlockTable(ids, held)

    def token_bytes(self, heads: Span) -> int:
        """Bytes of all planes of one token and layer, for a head range."""
        shape = self._layout.shape
        return shape.planes * len(heads) * shape.head_size * shape.element_bytes

    def payload_bytes(self, layers: Span, heads: Span, tokens: Span, unit: int) -> int:
        """Bytes of the payload of a box; a last, part-filled unit counts whole."""
        return len(layers) * -(-len(tokens) // unit) * unit * self.token_bytes(heads)

    def run_bytes(self, heads: Span, unit: int) -> int:
        """Bytes of the shortest contiguous run that a box with these heads is made of."""
        block_size = self._layout.block_size
        return self._head_bytes * (len(heads) if unit == block_size else 1) * unit // block_size

    def views(
        self, table: BlockTable, layers: Span, heads: Span, tokens: Span, unit: int
    ) -> list[memoryview]:
        """Return the box's contiguous runs where they lie, in the order of the payload.

        Runs that are neighbours in memory and in the payload are one. They can be written to
        unless the memory can only be read; who writes calls `clear_rest` after it. Raises
        ValueError for a part-filled unit, which has to be packed.
        """
        flat = self._bytes
        begins, ends = self._cuts(table, layers, heads, tokens, unit)
        return [flat[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]

    def crc(
        self, table: BlockTable, layers: Span, heads: Span, tokens: Span, unit: int, crc: int
    ) -> int:
        """Return `crc` continued over the box's payload, read where it lies.

        Raises ValueError for a part-filled unit, which has to be packed.
        """
        return crc_runs(self._bytes, self._cuts(table, layers, heads, tokens, unit), crc)

    def _cuts(self, table: BlockTable, layers: Span, heads: Span, tokens: Span, unit: int) -> Cuts:
        """Return where the box's runs begin and end, in bytes of the memory, in payload order."""
        if len(tokens) % unit:
            raise ValueError(f"tokens {tokens} do not fill their last unit of {unit}")
        begins = self._begins(self._units(table, tokens, unit), layers, heads, unit)
        run = self.run_bytes(heads, unit)
        (lasts,) = (begins[1:] - begins[:-1] != run).nonzero()
        ends = begins[np.append(lasts, len(begins) - 1)] + run
        return begins[np.append(0, lasts + 1)], ends

    def _begins(self, units: Units, layers: Span, heads: Span, unit: int) -> npt.NDArray[np.int64]:
        """Return the first byte of each of the box's runs of `run_bytes`, in payload order."""
        l0, h0 = self._shard.layers.begin, self._shard.heads.begin
        begins_LP = self._planes_LP[layers.begin - l0 : layers.end - l0].reshape(-1, 1)
        begins_UN = units.blocks * self._kv.strides[2]
        if units.ratio == 1:
            begins_UN += (heads.begin - h0) * self._head_bytes
        else:
            begins_UN += units.subs * (self._head_bytes // units.ratio)
            begins_N = np.arange(heads.begin - h0, heads.end - h0) * self._head_bytes
            begins_UN = (begins_UN.reshape(-1, 1) + begins_N).reshape(-1)
        begins: npt.NDArray[np.int64] = (begins_LP + begins_UN).reshape(-1)
        return begins

    def pack(
        self,
        payload: npt.NDArray[np.uint8],
        table: BlockTable,
        layers: Span,
        heads: Span,
        tokens: Span,
        unit: int,
    ) -> None:
        """Copy a box out of memory into `payload` (bytes); what lies beyond the tokens is zero."""
        out = self._shaped(payload, layers, heads, tokens, unit)
        units = self._units(table, tokens, unit)
        box = self._box(layers, heads, unit)
        parts = extents(units)
        if len(parts) > _MANY_EXTENTS and len(payload) < _SMALL_BYTES * len(parts):
            out[...] = box[:, :, units.blocks, units.subs]
        else:
            for begin, end in parts:
                out[:, :, begin:end] = units.slab(box, begin, end)
        rest = len(tokens) % unit
        if rest:
            out[:, :, -1, :, rest:] = 0

    def scatter(
        self,
        payload: npt.NDArray[np.uint8],
        table: BlockTable,
        layers: Span,
        heads: Span,
        tokens: Span,
        unit: int,
    ) -> None:
        """Copy `payload` into the blocks of a box, and `clear_rest`."""
        data = self._shaped(payload, layers, heads, tokens, unit)
        units = self._units(table, tokens, unit)
        box = self._box(layers, heads, unit)
        parts = extents(units)
        if len(parts) > _MANY_EXTENTS:
            box[:, :, units.blocks, units.subs] = data
        else:
            for begin, end in parts:
                units.slab(box, begin, end)[...] = data[:, :, begin:end]
        self.clear_rest(table, layers, heads, tokens)

    def copy_from(
        self,
        source: "KVMemory",
        source_table: BlockTable,
        table: BlockTable,
        layers: Span,
        heads: Span,
        tokens: Span,
        unit: int,
        crc: int | None = None,
    ) -> int | None:
        """Copy a box of another memory into this one, without a payload, and `clear_rest`.

        A box with a part-filled unit is packed all the same, so that nothing behind it comes along.
        With `crc`, returns it continued over the box's payload as it was read, each part right
        after it was copied. Raises ValueError where this memory is to be read from only.
        """
        if self._bytes.readonly:
            raise ValueError("this memory is read-only: it cannot be copied into")
        if len(tokens) % unit:
            payload = np.empty(self.payload_bytes(layers, heads, tokens, unit), np.uint8)
            source.pack(payload, source_table, layers, heads, tokens, unit)
            self.scatter(payload, table, layers, heads, tokens, unit)
            return None if crc is None else crc32(payload, crc)
        into = self._cuts(table, layers, heads, tokens, unit)
        out = source._cuts(source_table, layers, heads, tokens, unit)
        crc = copy_runs(self._bytes, into, source._bytes, out, crc)
        self.clear_rest(table, layers, heads, tokens)
        return crc

    def clear_rest(self, table: BlockTable, layers: Span, heads: Span, tokens: Span) -> None:
        """Zero what lies behind a box in its last block, where the box ends the rank's tokens.

        Another sequence's bytes must not stay visible there, whatever the sender wrote.
        """
        block_size = self._layout.block_size
        end = table.local(tokens.begin) + len(tokens)
        used = end % block_size
        if used and end == sum(len(span) for span in table.held):
            box = self._box(layers, heads, block_size)
            box[:, :, table.ids[end // block_size], 0, :, used:] = 0

    def _box(self, layers: Span, heads: Span, unit: int) -> Array:
        """Return the view [L, P, B, units of a block, N, unit, D] of some layers and heads."""
        l0, h0 = self._shard.layers.begin, self._shard.heads.begin
        kv = self._kv[layers.begin - l0 : layers.end - l0]
        count, planes, blocks, all_heads, block_size, size = kv.shape
        # Splitting one axis never copies, whatever the strides.
        split = kv.reshape(count, planes, blocks, all_heads, block_size // unit, unit, size)
        return split.transpose(0, 1, 2, 4, 3, 5, 6)[:, :, :, :, heads.begin - h0 : heads.end - h0]

    def _shaped(
        self,
        payload: npt.NDArray[np.uint8],
        layers: Span,
        heads: Span,
        tokens: Span,
        unit: int,
    ) -> Array:
        layout = self._layout.shape
        units = -(-len(tokens) // unit)
        shape = (len(layers), layout.planes, units, len(heads), unit, layout.head_size)
        return payload.view(self._kv.dtype).reshape(shape)

    def _units(self, table: BlockTable, tokens: Span, unit: int) -> Units:
        """Return where the tokens' units lie, the last of which may be filled in part."""
        begin = table.local(tokens.begin)
        if begin % unit or not len(tokens):
            raise ValueError(f"tokens {tokens} are none or do not begin on a unit of {unit}")
        ratio = self._layout.block_size // unit
        return units_of(table.ids, begin // unit, -(-len(tokens) // unit), ratio)


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


def memories_of(
    memories: Sequence[torch.Tensor], layout: CacheLayout, rank: int
) -> tuple[KVMemory, ...]:
    """Wrap each cache group's memory of a rank; raises ValueError where one does not fit."""
    if len(memories) != len(layout.groups):
        raise ValueError(f"{len(memories)} memories for {len(layout.groups)} cache groups")
    return tuple(
        KVMemory(memory, group, rank) for memory, group in zip(memories, layout.groups, strict=True)
    )


def tables_of(
    memories: Sequence[KVMemory],
    block_ids: Sequence[Sequence[int]],
    total_tokens: int,
    cp_first: int | None = None,
) -> tuple[BlockTable, ...]:
    """Return a sequence's table in each cache group's memory; raises ValueError as `table`."""
    if len(block_ids) != len(memories):
        raise ValueError(f"block ids for {len(block_ids)} cache groups of {len(memories)}")
    return tuple(
        memory.table(ids, total_tokens, cp_first)
        for memory, ids in zip(memories, block_ids, strict=True)
    )
