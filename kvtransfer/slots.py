"""Staging slots: where messages land on the receiver, and what the sender packs into.

Owns slot memory and each slot's state. Knows nothing of what the bytes mean.
"""

import mmap
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from kvtransfer.header import HEADER_BYTES

Bytes = npt.NDArray[np.uint8]

EPOCH_BITS, CONNECTION_BITS, SLOT_BITS, GENERATION_BITS, KIND_BITS = 8, 22, 6, 26, 2
MAX_CONNECTION = 1 << CONNECTION_BITS
MAX_GENERATION = 1 << GENERATION_BITS
_DATA_KIND = 1


def data_tag(epoch: int, connection: int, slot: int, generation: int) -> int:
    """Return the 64-bit tag of one use of one slot; no tag comes twice in an epoch.

    UCX matches tags per worker and not per endpoint, so the receiver's connection number is in
    every tag: one sender can never hit another's slot.
    """
    if slot >> SLOT_BITS or connection >= MAX_CONNECTION or generation >= MAX_GENERATION:
        raise OverflowError("tags of this connection are used up")
    tag = epoch & ((1 << EPOCH_BITS) - 1)
    tag = tag << CONNECTION_BITS | connection
    tag = tag << SLOT_BITS | slot
    tag = tag << GENERATION_BITS | generation
    return tag << KIND_BITS | _DATA_KIND


def page_aligned(size: int) -> Bytes:
    """Return zeroed bytes; memory that is not aligned is copied far more slowly."""
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, count=size)


class SlotState(StrEnum):
    """Where a receive slot stands.

    FREE: no receive is posted. GRANTED: a receive is posted, the sender holds the credit, and the
    transport may write at any time. FILLING: the receive is terminal and its bytes are being
    checked (a tagged receive does not tell when its first byte lands). VERIFIED: they passed and
    are being scattered. QUARANTINED: the link is gone, but the transport may still write.
    """

    FREE = "free"
    GRANTED = "granted"
    FILLING = "filling"
    VERIFIED = "verified"
    QUARANTINED = "quarantined"


_NEXT: dict[SlotState, frozenset[SlotState]] = {
    SlotState.FREE: frozenset({SlotState.GRANTED}),
    SlotState.GRANTED: frozenset({SlotState.FILLING, SlotState.QUARANTINED}),
    SlotState.FILLING: frozenset({SlotState.VERIFIED, SlotState.FREE}),
    SlotState.VERIFIED: frozenset({SlotState.FREE}),
    SlotState.QUARANTINED: frozenset({SlotState.FREE}),
}


@dataclass(slots=True)
class ReceiveSlot:
    """One staging buffer and its state; `generation` counts its uses and never goes back."""

    index: int
    buffer: Bytes
    state: SlotState = SlotState.FREE
    generation: int = 0

    def become(self, state: SlotState) -> None:
        """Go to `state`; an impossible step is a bug of ours."""
        assert state in _NEXT[self.state], f"slot {self.index}: {self.state} to {state}"
        self.state = state


class ReceiveSlots:
    """The slots of one connection. They are never shared with or passed on to another one."""

    def __init__(self, count: int, slot_bytes: int) -> None:
        self._slots = [
            ReceiveSlot(index, page_aligned(HEADER_BYTES + slot_bytes)) for index in range(count)
        ]

    def __iter__(self) -> Iterator[ReceiveSlot]:
        return iter(self._slots)

    def grant(self, slot: ReceiveSlot) -> int:
        """Take a free slot into its next use; return the generation.

        Raises OverflowError when the slot's generations are used up: the connection must end.
        """
        if slot.generation + 1 >= MAX_GENERATION:
            raise OverflowError("slot generations of this connection are used up")
        slot.become(SlotState.GRANTED)
        slot.generation += 1
        # What an empty or short message leaves behind must not read as the last use's header.
        slot.buffer[:HEADER_BYTES] = 0
        return slot.generation

    def quarantine(self) -> bool:
        """The link is gone: put outstanding slots aside; whether there were any."""
        outstanding = [slot for slot in self._slots if slot.state is SlotState.GRANTED]
        for slot in outstanding:
            slot.become(SlotState.QUARANTINED)
        return bool(outstanding)

    @property
    def quiet(self) -> bool:
        """Whether the transport can write into none of the slots any more."""
        return all(
            slot.state not in (SlotState.GRANTED, SlotState.QUARANTINED) for slot in self._slots
        )

    def counts(self) -> Counter[SlotState]:
        """Number of slots in each state."""
        return Counter(slot.state for slot in self._slots)


class SendSlots:
    """Buffers that messages are packed into; one stays taken until its send is terminal."""

    def __init__(self, count: int, slot_bytes: int) -> None:
        self._free: deque[Bytes] = deque(
            page_aligned(HEADER_BYTES + slot_bytes) for _ in range(count)
        )
        self.count = count

    def take(self) -> Bytes | None:
        """Return a buffer, or None while all are being sent."""
        return self._free.popleft() if self._free else None

    def give_back(self, buffer: Bytes) -> None:
        """Return a buffer whose send is terminal."""
        self._free.append(buffer)

    @property
    def free(self) -> int:
        """Number of buffers that no send uses."""
        return len(self._free)
