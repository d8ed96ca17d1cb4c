"""Another process's caches, of the host's memory or of a GPU's, for who reads them where they lie.

Owns the way from what a peer's hello offers to memories. Knows nothing of transfers.
"""

import math
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvtransfer.addresses import Memory
from kvtransfer.device_memory import Boxes, DeviceMemory
from kvtransfer.layout import KVLayout
from kvtransfer.memory import KVMemory, bits_type, element_type, sizes_of
from kvtransfer.send_lanes import CARRIERS
from kvtransfer.shared import Lease, MappedRegion, NotMappable
from kvtransfer.slots import page_aligned
from kvtransfer.wire import LaneKind


class Caches(Protocol):
    """One sender's."""

    @property
    def carrier(self) -> str:
        """How they are read, in a word."""
        ...

    @property
    def blocks(self) -> Sequence[int]:
        """Number of blocks of each cache group."""
        ...

    def stands(self, lease: Lease) -> bool:
        """Whether the owner still holds what the lease is for."""
        ...

    def memory(self, group: int, layout: KVLayout, rank: int) -> Memory:
        """Return a group's memory, to read from; ValueError where it does not fit the layout."""
        ...

    def probe(self, size: int) -> float:
        """Return how many seconds it takes to read so many bytes."""
        ...


class MappedCaches:
    """See Caches: of the host's memory."""

    carrier = CARRIERS[LaneKind.MAPPED]

    def __init__(self, region: MappedRegion, offsets: Sequence[tuple[int, int]]) -> None:
        """`offsets` gives where in the region each group begins, and its number of blocks."""
        self._region = region
        self._offsets = [offset for offset, _ in offsets]
        self.blocks = [blocks for _, blocks in offsets]
        self.stands = region.stands

    def memory(self, group: int, layout: KVLayout, rank: int) -> Memory:
        """See Caches."""
        sizes = sizes_of(layout, rank, self.blocks[group])
        element = element_type(layout.shape.dtype)
        array = self._region.array(self._offsets[group], sizes, element)
        return KVMemory.from_numpy(array, layout, rank)

    def probe(self, size: int) -> float:
        """See Caches. The region is read again and again if it is smaller."""
        into = page_aligned(size)
        began = time.perf_counter()
        for begin in range(0, size, self._region.size):
            part = into[begin : begin + self._region.size]
            np.copyto(part, self._region.bytes(len(part)))
        return time.perf_counter() - began


class LentCaches:
    """See Caches: of a GPU's memory."""

    carrier = CARRIERS[LaneKind.DEVICE]

    def __init__(
        self,
        region: MappedRegion,
        offsets: Sequence[tuple[int, int]],
        lent: Sequence[bytes],
        boxes: Boxes,
    ) -> None:
        """Open what is lent; raises NotMappable where that cannot be. The region has the leases."""
        if not lent or len(lent) != len(offsets):
            raise NotMappable("the peer lends no memory of a GPU")
        try:
            self._opened = [boxes.borrow(each) for each in lent]
        except OSError as exc:
            raise NotMappable(f"the peer's GPU memory cannot be opened: {exc}") from exc
        self._boxes = boxes
        self.blocks = [blocks for _, blocks in offsets]
        self.stands = region.stands

    def memory(self, group: int, layout: KVLayout, rank: int) -> Memory:
        """See Caches."""
        sizes = sizes_of(layout, rank, self.blocks[group])
        size = math.prod(sizes) * layout.shape.element_bytes
        opened = self._opened[group]
        if size != len(opened):
            raise ValueError(f"the peer's cache has {len(opened)} bytes, not {size}")
        memory = opened.view(bits_type(layout.shape.dtype)).view(sizes)
        return DeviceMemory(memory, layout, rank, self._boxes)

    def probe(self, size: int) -> float:
        """See Caches."""
        began = time.perf_counter()
        self._boxes.read(self._opened[0][:size])
        return time.perf_counter() - began
