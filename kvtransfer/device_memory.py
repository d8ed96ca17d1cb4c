"""A rank's cache memory on a GPU, which transfers read and write there.

Between GPUs of one host a box goes from cache to cache. The host reaches no run of it: what travels
otherwise is packed there and copied over. Owns no copy: that is its boxes'.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from isal.isal_zlib import crc32

from kvtransfer.addresses import BlockTable, Memory
from kvtransfer.layout import Box, CacheLayout, KVLayout
from kvtransfer.memory import KVMemory, bits_of, check_shape

# Of each unit its block and its place in the block; and the heads of the memory.
Places = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], slice]


class Boxes(Protocol):
    """Copies on a device, each over when it returns; from any thread.

    Shapes as in kvtransfer.memory, of some layers; of the last unit only `tokens` are copied, and
    the rest becomes zero.
    """

    def copy(
        self,
        into: torch.Tensor,
        source: torch.Tensor,
        to: Places,
        at: Places,
        unit: int,
        tokens: int,
    ) -> None:
        """Copy a box between memories, of which one may be another process's."""
        ...

    def pack(
        self, payload: torch.Tensor, memory: torch.Tensor, at: Places, unit: int, tokens: int
    ) -> None:
        """Copy a box to a payload in the host's memory."""
        ...

    def unpack(
        self, memory: torch.Tensor, payload: torch.Tensor, to: Places, unit: int, tokens: int
    ) -> None:
        """Copy a payload in the host's memory to its box."""
        ...

    def clear(self, part: torch.Tensor) -> None:
        """Make a part of a memory zero."""
        ...

    def read(self, part: torch.Tensor) -> None:
        """Read a part of a memory, to see how long that takes."""
        ...

    def lend(self, memory: torch.Tensor) -> bytes:
        """Return what another process of the host opens a memory with; raises OSError."""
        ...

    def borrow(self, lent: bytes) -> torch.Tensor:
        """Return another process's memory as bytes; raises OSError where it cannot be opened."""
        ...


class DeviceMemory(Memory):
    """See Memory: a GPU's."""

    def __init__(self, memory: torch.Tensor, layout: KVLayout, rank: int, boxes: Boxes) -> None:
        """Wrap memory [L, P, B, N, S, D] without copying; of a block each head is contiguous.

        Raises ValueError where the memory does not fit the layout.
        """
        check_shape(memory.shape, layout, rank)
        super().__init__(layout, rank, memory.shape[2])
        self._kv = bits_of(memory, layout)
        self._boxes = boxes

    def run_bytes(self, box: Box) -> int:
        """See Memory."""
        return 0

    def views(self, table: BlockTable, box: Box) -> list[memoryview]:
        """See Memory: there are none."""
        raise ValueError("the host reaches no runs of a GPU's memory")

    def crc(self, table: BlockTable, box: Box, crc: int) -> int:
        """See Memory."""
        payload = np.empty(self.payload_bytes(box), np.uint8)
        self.pack(payload, table, box)
        return crc32(payload, crc)

    def pack(self, payload: npt.NDArray[np.uint8], table: BlockTable, box: Box) -> None:
        """See Memory."""
        at, into = self._places(table, box), self._shaped(payload, box)
        self._boxes.pack(into, self._of(box), at, box.unit, len(box.tokens))

    def scatter(self, payload: npt.NDArray[np.uint8], table: BlockTable, box: Box) -> None:
        """See Memory."""
        to, data = self._places(table, box), self._shaped(payload, box)
        self._boxes.unpack(self._of(box), data, to, box.unit, len(box.tokens))
        self.clear_rest(table, box)

    def copy_from(
        self,
        source: "DeviceMemory",
        source_table: BlockTable,
        table: BlockTable,
        box: Box,
        crc: int | None = None,
    ) -> int | None:
        """See Memory."""
        to, at = self._places(table, box), source._places(source_table, box)
        self._boxes.copy(self._of(box), source._of(box), to, at, box.unit, len(box.tokens))
        self.clear_rest(table, box)
        return None if crc is None else self.crc(table, box, crc)

    def clear_rest(self, table: BlockTable, box: Box) -> None:
        """See Memory."""
        rest = self._rest(table, box.tokens)
        if rest is not None:
            block, used = rest
            _, heads = self._own(box)
            self._boxes.clear(self._of(box)[:, :, block, heads, used:])

    def _of(self, box: Box) -> torch.Tensor:
        layers, _ = self._own(box)
        return self._kv[layers]

    def _places(self, table: BlockTable, box: Box) -> Places:
        units = self._units(table, box)
        _, heads = self._own(box)
        return units.blocks, units.subs, heads

    def _shaped(self, payload: npt.NDArray[np.uint8], box: Box) -> torch.Tensor:
        return torch.from_numpy(payload).view(self._kv.dtype).view(self._payload_shape(box))


def memories_of(
    memories: Sequence[torch.Tensor], layout: CacheLayout, rank: int, boxes: Boxes | None = None
) -> tuple[Memory, ...]:
    """Wrap each cache group's memory of a rank: the host's, or with `boxes` a GPU's.

    Raises ValueError where one does not fit.
    """
    if len(memories) != len(layout.groups):
        raise ValueError(f"{len(memories)} memories for {len(layout.groups)} cache groups")
    pairs = zip(memories, layout.groups, strict=True)
    if boxes is None:
        return tuple(KVMemory(memory, group, rank) for memory, group in pairs)
    return tuple(DeviceMemory(memory, group, rank, boxes) for memory, group in pairs)
