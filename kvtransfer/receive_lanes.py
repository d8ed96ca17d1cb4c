"""The receiver's end of a connection's data lane: what all have in common, tagged and stream.

Owns where bytes land on one connection, and that nothing lands that its owner has not allowed.
Knows nothing of what a transfer needs: its owner says where an announced piece belongs.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvtransfer import wire
from kvtransfer.addresses import BlockTable, Memory
from kvtransfer.errors import (
    ChecksumMismatch,
    PeerLost,
    ProtocolViolation,
    StaleRead,
    TransferError,
)
from kvtransfer.header import HEADER_BYTES, MEANT, DataHeader, intact, unseal
from kvtransfer.layout import Box, CacheLayout
from kvtransfer.send_lanes import DIRECT_BYTES
from kvtransfer.settings import MAX_PIECE_BYTES, TransferSettings
from kvtransfer.slots import Bytes, ReceiveSlot, ReceiveSlots, SlotState, data_tag, page_aligned
from kvtransfer.stats import Counters
from kvtransfer.transport import Link

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Landing:
    """Where an announced piece may land: checked against grant and plan, all but its bytes."""

    header: DataHeader
    crc: int
    memory: Memory
    table: BlockTable
    box: Box
    source_layout: CacheLayout
    total_tokens: int
    owner_key: Any

    def direct(self, shortest_bytes: int = DIRECT_BYTES) -> bool:
        """Whether the box's runs are long enough to land in the cache themselves."""
        return not self.box.part and self.memory.run_bytes(self.box) >= shortest_bytes

    def views(self) -> list[memoryview]:
        """Return the runs of the box."""
        return self.memory.views(self.table, self.box)

    def clear_rest(self) -> None:
        """Zero what lies behind the box in its last block, if the rank's tokens end there."""
        self.memory.clear_rest(self.table, self.box)

    def scatter(self, payload: Bytes) -> None:
        """Copy a checked payload into the box."""
        self.memory.scatter(payload, self.table, self.box)


class Owner(Protocol):
    """Who decides what may land."""

    def announced(
        self, source: int, header: DataHeader, crc: int, checksummed: bool
    ) -> Landing | None:
        """Return where a piece may land, or None: then it is thrown away."""
        ...

    def landed(self, source: int, landing: Landing) -> None:
        """The piece's bytes are in place and as they were sent."""
        ...

    def refuse(self, source: int, landing: Landing, error: TransferError) -> None:
        """The piece was wrong after all: its transfer must not go on."""
        ...


class ReceiveLane(Protocol):
    """How one connection's payload comes in; for the agent's thread."""

    @property
    def carrier(self) -> str:
        """What carries it: "mapped", "tcp", "ucx/rc_mlx5"."""
        ...

    @property
    def probed_bytes(self) -> int:
        """Bytes of probes that have arrived."""
        ...

    @property
    def probe_s(self) -> float:
        """Seconds in which the last probe was read, where only the reader knows; else 0."""
        ...

    def start(self) -> None:
        """Take what comes; the welcome has been sent."""
        ...

    def told(self, message: wire.Control) -> bool:
        """Take what the sender says about the lane; False for what is not the lane's."""
        ...

    def done(self, key: Any, error: str | None) -> None:
        """An operation that the lane started is terminal; raises TransferError: close the link."""
        ...

    def settle(self) -> None:
        """Say what has been taken since the last time."""
        ...

    def drop(self, transfer_id: int) -> None:
        """Let nothing of a transfer land any more, from now on."""
        ...

    def close(self) -> None:
        """The link is about to close: put aside what can still be written to."""
        ...

    def states(self) -> Counter[SlotState]:
        """Slots by state; those that can still be written to count as granted or quarantined."""
        ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """The connection that a lane belongs to."""

    link: Link
    number: int
    rank: int
    epoch: int
    settings: TransferSettings
    counters: Counters
    owner: Owner

    def verified(self, head: bytes | memoryview, payload: Sequence[memoryview], crc: int) -> bool:
        """Whether header and payload are what was sent."""
        with self.counters.spent("checksum_s"):
            return intact(head, payload, crc)

    def scatter(self, landing: Landing, payload: memoryview) -> None:
        """Copy a checked payload into its box."""
        with self.counters.spent("scatter_s"):
            landing.scatter(np.frombuffer(payload, np.uint8))


class TaggedReceive:
    """Granted slots into which tagged messages land; checked there, then scattered."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._open = True
        self._slots = ReceiveSlots(place.settings.slots_per_connection, place.settings.slot_bytes)
        self.probed_bytes = 0
        self.probe_s = 0.0

    @property
    def carrier(self) -> str:
        """See ReceiveLane."""
        return self._place.link.tagged.carrier

    def start(self) -> None:
        """See ReceiveLane."""
        self._grant(list(self._slots))

    def told(self, message: wire.Control) -> bool:
        """See ReceiveLane."""
        return False

    def done(self, key: Any, error: str | None) -> None:
        """See ReceiveLane."""
        slot: ReceiveSlot = key
        if slot.state is SlotState.QUARANTINED:
            slot.become(SlotState.FREE)
            return
        slot.become(SlotState.FILLING)
        try:
            if error is None:
                self._message(slot)
        finally:
            slot.become(SlotState.FREE)
        if error is not None:
            raise PeerLost(f"receive failed: {error}")
        if self._open:
            self._grant([slot])

    def settle(self) -> None:
        """See ReceiveLane: a credit leaves as soon as its slot is free."""

    def drop(self, transfer_id: int) -> None:
        """See ReceiveLane: what lands in a slot is checked before it goes anywhere."""

    def close(self) -> None:
        """See ReceiveLane: a remote write may be in flight into a slot whose receive is out."""
        self._open = False
        self._slots.quarantine()

    def states(self) -> Counter[SlotState]:
        """See ReceiveLane."""
        return self._slots.counts()

    def _grant(self, slots: list[ReceiveSlot]) -> None:
        """Post a receive for each slot, then hand the credits over: in this order."""
        place = self._place
        credits = []
        for slot in slots:
            try:
                generation = self._slots.grant(slot)
            except OverflowError as exc:
                raise TransferError(str(exc)) from exc
            tag = data_tag(place.epoch, place.number, slot.index, generation)
            place.link.tagged.receive(tag, slot.buffer, (place.number, slot))
            credits.append((slot.index, generation))
        place.link.send_control(wire.encode(wire.Credit(tuple(credits))))

    def _message(self, slot: ReceiveSlot) -> None:
        view, place = memoryview(slot.buffer.data), self._place
        head = view[:HEADER_BYTES]
        header, crc, checksummed = unseal(head)
        if header.payload_bytes > len(view) - HEADER_BYTES:
            raise ProtocolViolation(f"{header.payload_bytes} payload bytes in a slot")
        if header.probe:
            self.probed_bytes += header.payload_bytes
            return
        landing = place.owner.announced(place.number, header, crc, checksummed)
        if landing is None:
            return
        payload = view[HEADER_BYTES : HEADER_BYTES + header.payload_bytes]
        if (header.slot, header.generation) != (slot.index, slot.generation):
            wrong = ProtocolViolation("a message for another slot or generation")
            place.owner.refuse(place.number, landing, wrong)
        elif checksummed and not place.verified(head, (payload,), crc):
            place.owner.refuse(place.number, landing, damaged(header))
        else:
            slot.become(SlotState.VERIFIED)
            place.scatter(landing, payload)
            place.owner.landed(place.number, landing)


class StreamReceive:
    """Pieces read off the link's stream: the header first, so that bytes land where they belong."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._head = memoryview(bytearray(HEADER_BYTES))
        self._end = memoryview(bytearray(len(MEANT)))
        self._scratch = page_aligned(place.settings.slot_bytes)
        self._header: DataHeader | None = None
        self._checksummed = False
        self._landing: Landing | None = None
        self._parts: Sequence[memoryview] = ()
        self.probed_bytes = 0
        self.probe_s = 0.0

    @property
    def carrier(self) -> str:
        """See ReceiveLane."""
        return self._place.link.stream_carrier

    def start(self) -> None:
        """See ReceiveLane."""
        self._receive((self._head,))

    def told(self, message: wire.Control) -> bool:
        """See ReceiveLane."""
        return False

    def done(self, key: Any, error: str | None) -> None:
        """See ReceiveLane."""
        if error is not None:
            return  # the link is closed
        if self._header is None:
            self._begin()
        else:
            header, landing = self._header, self._landing
            self._header = self._landing = None
            if header.probe:
                self.probed_bytes += header.payload_bytes
            if landing is not None:
                self._finish(landing)
            self._parts = ()
            self._receive((self._head,))

    def settle(self) -> None:
        """See ReceiveLane: the kernel's own flow control holds the sender back."""

    def drop(self, transfer_id: int) -> None:
        """See ReceiveLane."""
        if self._landing is not None and self._landing.header.transfer_id == transfer_id:
            self._place.link.stream.divert(self._key)
            self._landing = None

    def close(self) -> None:
        """See ReceiveLane: bytes move only within our own calls, so nothing comes late."""
        self._landing = None

    def states(self) -> Counter[SlotState]:
        """See ReceiveLane."""
        return Counter()

    @property
    def _key(self) -> tuple[int, None]:
        return self._place.number, None

    def _receive(self, parts: Sequence[memoryview]) -> None:
        self._place.link.stream.receive(parts, self._key)

    def _begin(self) -> None:
        """A header is here: have its payload land where it belongs, or be thrown away."""
        header, crc, self._checksummed = unseal(self._head)
        if header.payload_bytes > MAX_PIECE_BYTES:
            raise ProtocolViolation(f"a piece of {header.payload_bytes} bytes in a stream")
        self._header = header
        if not header.probe:
            place = self._place
            self._landing = place.owner.announced(place.number, header, crc, self._checksummed)
        if self._landing is not None and self._landing.direct():
            self._parts = self._landing.views()
        else:
            if len(self._scratch) < header.payload_bytes:
                self._scratch = page_aligned(header.payload_bytes)
            self._parts = (memoryview(self._scratch[: header.payload_bytes].data),)
        self._receive((*self._parts, self._end))

    def _finish(self, landing: Landing) -> None:
        place = self._place
        if self._end != MEANT:
            let_go = StaleRead("the sender let its blocks go before they were sent")
            place.owner.refuse(place.number, landing, let_go)
            return
        if self._checksummed and not place.verified(self._head, self._parts, landing.crc):
            place.owner.refuse(place.number, landing, damaged(landing.header))
            return
        if landing.direct():
            landing.clear_rest()
        else:
            place.scatter(landing, self._parts[0])
        place.owner.landed(place.number, landing)


def damaged(header: DataHeader) -> ChecksumMismatch:
    """Return the error for a piece whose bytes are not those of its checksum."""
    return ChecksumMismatch(f"piece {header.sequence} arrived damaged")
