"""Where a sequence's keys and values lie in a rank's blocks, and what a memory of them can do.

Owns the arithmetic from global layers, heads and tokens to units of blocks. Shapes as in
kvtransfer.memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from kvtransfer.layout import Box, KVLayout, Span
from kvtransfer.runs import Units, units_of


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


class Memory(ABC):
    """One rank's memory of one cache group, addressed by global layers, heads and tokens."""

    def __init__(self, layout: KVLayout, rank: int, blocks: int) -> None:
        """Of so many blocks; raises ValueError where there are none."""
        if not blocks:
            raise ValueError("KV memory has no blocks")
        self._layout = layout
        self._shard = layout.shard(rank)
        self._num_blocks = blocks

    @property
    def blocks(self) -> int:
        """Number of blocks in the memory."""
        return self._num_blocks

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

    def payload_bytes(self, box: Box) -> int:
        """Bytes of the payload of a box; a last, part-filled unit counts whole."""
        return len(box.layers) * box.units * box.unit * self.token_bytes(box.heads)

    @abstractmethod
    def run_bytes(self, box: Box) -> int:
        """Bytes of the shortest contiguous run that a box is made of.

        0 where the host reaches none of them, so that all has to be packed.
        """

    @abstractmethod
    def views(self, table: BlockTable, box: Box) -> list[memoryview]:
        """Return the box's contiguous runs where they lie, in the order of the payload.

        Runs that are neighbours in memory and in the payload are one. They can be written to
        unless the memory can only be read; who writes calls `clear_rest` after it. Raises
        ValueError for a part-filled unit, which has to be packed.
        """

    @abstractmethod
    def crc(self, table: BlockTable, box: Box, crc: int) -> int:
        """Return `crc` continued over the box's payload, read where it lies.

        Raises ValueError for a part-filled unit, which has to be packed.
        """

    @abstractmethod
    def pack(self, payload: npt.NDArray[np.uint8], table: BlockTable, box: Box) -> None:
        """Copy a box out of memory into `payload` (bytes); what lies beyond the tokens is zero."""

    @abstractmethod
    def scatter(self, payload: npt.NDArray[np.uint8], table: BlockTable, box: Box) -> None:
        """Copy `payload` into the blocks of a box, and `clear_rest`."""

    @abstractmethod
    def copy_from(
        self,
        source: Self,
        source_table: BlockTable,
        table: BlockTable,
        box: Box,
        crc: int | None = None,
    ) -> int | None:
        """Copy a box of another memory into this one, without a payload, and `clear_rest`.

        A box with a part-filled unit is packed all the same, so that nothing behind it comes along.
        With `crc`, returns it continued over the box's payload as it was read, each part right
        after it was copied. Raises ValueError where this memory is to be read from only.
        """

    @abstractmethod
    def clear_rest(self, table: BlockTable, box: Box) -> None:
        """Zero what lies behind a box in its last block, where the box ends the rank's tokens.

        Another sequence's bytes must not stay visible there, whatever the sender wrote.
        """

    def _rest(self, table: BlockTable, tokens: Span) -> tuple[int, int] | None:
        """Return the block whose rest a box is to clear, and how many tokens are before that."""
        end = table.local(tokens.begin) + len(tokens)
        used = end % self._layout.block_size
        if not used or end != sum(len(span) for span in table.held):
            return None
        return int(table.ids[end // self._layout.block_size]), used

    def _own(self, box: Box) -> tuple[slice, slice]:
        """Return where a box's layers and heads are among those of this memory."""
        pairs = (box.layers, self._shard.layers), (box.heads, self._shard.heads)
        of_layers, of_heads = (
            slice(span.begin - own.begin, span.end - own.begin) for span, own in pairs
        )
        return of_layers, of_heads

    def _payload_shape(self, box: Box) -> tuple[int, int, int, int, int, int]:
        shape = self._layout.shape
        layers, heads = len(box.layers), len(box.heads)
        return layers, shape.planes, box.units, heads, box.unit, shape.head_size

    def _units(self, table: BlockTable, box: Box) -> Units:
        """Return where the box's units lie, the last of which may be filled in part."""
        tokens, unit = box.tokens, box.unit
        begin = table.local(tokens.begin)
        if begin % unit or not len(tokens):
            raise ValueError(f"tokens {tokens} are none or do not begin on a unit of {unit}")
        return units_of(table.ids, begin // unit, box.units, self._layout.block_size // unit)


def tables_of(
    memories: Sequence[Memory],
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
