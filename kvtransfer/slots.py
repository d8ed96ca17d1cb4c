"""Staging slots: where messages land on the receiver, and what the sender packs into.

Owns slot memory and each slot's state. Knows nothing of what the bytes mean.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from kvtransfer.wire import HEADER_BYTES, MAX_GENERATION

Bytes = npt.NDArray[np.uint8]


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
            ReceiveSlot(index, np.zeros(HEADER_BYTES + slot_bytes, dtype=np.uint8))
            for index in range(count)
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
            np.zeros(HEADER_BYTES + slot_bytes, dtype=np.uint8) for _ in range(count)
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
