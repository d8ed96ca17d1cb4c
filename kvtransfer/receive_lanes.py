"""The receiver's end of a connection's data lane, one class for each way that payload can travel.

Owns where bytes land on one connection, and that nothing lands that its owner has not allowed.
Knows nothing of what a transfer needs: its owner says where an announced piece belongs.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from kvtransfer import wire
from kvtransfer.errors import (
    ChecksumMismatch,
    PeerLost,
    ProtocolViolation,
    StaleRead,
    TransferError,
)
from kvtransfer.header import HEADER_BYTES, MEANT, DataHeader, crc_of_head, intact, unseal
from kvtransfer.layout import CacheLayout
from kvtransfer.memory import BlockTable, KVMemory, element_type
from kvtransfer.send_lanes import DIRECT_BYTES, MAPPED_DIRECT_BYTES
from kvtransfer.settings import MAX_PIECE_BYTES, TransferSettings
from kvtransfer.shared import Lease, MappedRegion
from kvtransfer.slots import Bytes, ReceiveSlot, ReceiveSlots, SlotState, data_tag, page_aligned
from kvtransfer.stats import Counters
from kvtransfer.transport import Link

logger = logging.getLogger(__name__)

_TABLES = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Landing:
    """Where an announced piece may land: checked against grant and plan, all but its bytes."""

    header: DataHeader
    crc: int
    memory: KVMemory
    table: BlockTable
    unit: int
    source_layout: CacheLayout
    total_tokens: int
    owner_key: Any

    def direct(self, shortest_bytes: int = DIRECT_BYTES) -> bool:
        """Whether the box's runs are long enough to land in the cache themselves."""
        whole = len(self.header.tokens) % self.unit == 0
        return whole and self.memory.run_bytes(self.header.heads, self.unit) >= shortest_bytes

    def views(self) -> list[memoryview]:
        """Return the runs of the box."""
        h = self.header
        return self.memory.views(self.table, h.layers, h.heads, h.tokens, self.unit)

    def clear_rest(self) -> None:
        """Zero what lies behind the box in its last block, if the rank's tokens end there."""
        h = self.header
        self.memory.clear_rest(self.table, h.layers, h.heads, h.tokens)

    def scatter(self, payload: Bytes) -> None:
        """Copy a checked payload into the box."""
        h = self.header
        self.memory.scatter(payload, self.table, h.layers, h.heads, h.tokens, self.unit)


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
            place.owner.refuse(place.number, landing, _damaged(header))
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
            place.owner.refuse(place.number, landing, _damaged(landing.header))
            return
        if landing.direct():
            landing.clear_rest()
        else:
            place.scatter(landing, self._parts[0])
        place.owner.landed(place.number, landing)


@dataclass(slots=True)
class _Named:
    """Where a transfer's blocks lie in the sender's memory, as far as it has told."""

    lease: Lease
    ids: dict[int, list[int]] = field(default_factory=dict)
    tables: dict[int, BlockTable] = field(default_factory=dict)


class MappedReceive:
    """Pieces read from the sender's cache, which this process has mapped read-only."""

    def __init__(
        self, place: Place, region: MappedRegion, offsets: tuple[tuple[int, int], ...]
    ) -> None:
        self._place = place
        self._region = region
        self._offsets = offsets
        self._memories: dict[tuple[CacheLayout, int], KVMemory] = {}
        self._named: OrderedDict[tuple[int, bytes], _Named] = OrderedDict()
        self._scratch = page_aligned(0)
        self._taken = 0
        self.probed_bytes = 0

    carrier = "mapped"

    def start(self) -> None:
        """See ReceiveLane."""

    def told(self, message: wire.Control) -> bool:
        """See ReceiveLane."""
        match message:
            case wire.Table():
                self._table(message)
            case wire.Piece(head):
                self._taken += 1
                self._piece(head)
            case wire.Ping(_, probe_bytes) if probe_bytes:
                self._probe(probe_bytes)
                return False
            case _:
                return False
        return True

    def done(self, key: Any, error: str | None) -> None:
        """See ReceiveLane: nothing is ever started on the link."""

    def settle(self) -> None:
        """See ReceiveLane."""
        if self._taken:
            self._place.link.send_control(wire.encode(wire.Taken(self._taken)))
            self._taken = 0

    def drop(self, transfer_id: int) -> None:
        """See ReceiveLane."""
        for key in [key for key in self._named if key[0] == transfer_id]:
            del self._named[key]

    def close(self) -> None:
        """See ReceiveLane: only this thread copies, so nothing comes late."""
        self._named.clear()

    def states(self) -> Counter[SlotState]:
        """See ReceiveLane."""
        return Counter()

    def _table(self, table: wire.Table) -> None:
        key = (table.transfer_id, table.nonce)
        named = self._named.setdefault(key, _Named(table.lease))
        if len(self._named) > _TABLES:
            self._named.popitem(last=False)
        if table.group >= len(self._offsets) or named.lease != table.lease:
            raise ProtocolViolation("a table of a group or lease that does not exist")
        ids = named.ids.setdefault(table.group, [])
        blocks = self._offsets[table.group][1]
        if table.first != len(ids) or len(ids) + len(table.block_ids) > blocks:
            raise ProtocolViolation("a table out of order or longer than the cache")
        ids += table.block_ids

    def _piece(self, head: bytes) -> None:
        place = self._place
        header, crc, checksummed = unseal(head)
        landing = place.owner.announced(place.number, header, crc, checksummed)
        if landing is None:
            return
        try:
            self._copy(landing, head if checksummed else None)
        except ValueError as exc:
            place.owner.refuse(place.number, landing, ProtocolViolation(str(exc)))
        except TransferError as exc:
            place.owner.refuse(place.number, landing, exc)
        else:
            place.owner.landed(place.number, landing)

    def _copy(self, landing: Landing, head: bytes | None) -> None:
        """Bring a piece in; with `head`, its checksum is verified.

        Raises StaleRead where the sender has let the blocks go before the copy was over.
        """
        h = landing.header
        named = self._named.get((h.transfer_id, h.nonce))
        if named is None or h.group not in named.ids:
            raise ProtocolViolation("a piece of blocks that were not told")
        memory = self._memory(landing, h.group)
        table = named.tables.get(h.group)
        if table is None:
            table = memory.table(named.ids[h.group], landing.total_tokens)
            named.tables[h.group] = table
        box = (h.layers, h.heads, h.tokens, landing.unit)
        theirs = memory.run_bytes(h.heads, landing.unit)
        long = landing.direct(MAPPED_DIRECT_BYTES) and theirs >= MAPPED_DIRECT_BYTES
        if head is None or long:
            begun = None if head is None else crc_of_head(head)
            with self._place.counters.spent("scatter_s"):
                crc = landing.memory.copy_from(memory, table, landing.table, *box, begun)
            self._check_lease(named)
            if crc is not None and crc != landing.crc:
                raise _damaged(h)
            return
        if len(self._scratch) < h.payload_bytes:
            self._scratch = page_aligned(h.payload_bytes)
        payload = self._scratch[: h.payload_bytes]
        with self._place.counters.spent("pack_s"):
            memory.pack(payload, table, *box)
        self._check_lease(named)
        if not self._place.verified(head, (memoryview(payload.data),), landing.crc):
            raise _damaged(h)
        self._place.scatter(landing, memoryview(payload.data))

    def _check_lease(self, named: _Named) -> None:
        if not self._region.stands(named.lease):
            raise StaleRead("the sender let its blocks go before they were read")

    def _memory(self, landing: Landing, group: int) -> KVMemory:
        key = (landing.source_layout, group)
        if key not in self._memories:
            layout = landing.source_layout.groups[group]
            shard, shape = layout.shard(self._place.rank), layout.shape
            offset, blocks = self._offsets[group]
            sizes = (
                len(shard.layers),
                shape.planes,
                blocks,
                len(shard.heads),
                layout.block_size,
                shape.head_size,
            )
            array = self._region.array(offset, sizes, element_type(shape.dtype))
            self._memories[key] = KVMemory.from_numpy(array, layout, self._place.rank)
        return self._memories[key]

    def _probe(self, size: int) -> None:
        """Read so many bytes, the region's again and again if it is smaller."""
        size = min(size, MAX_PIECE_BYTES)
        into = page_aligned(size)
        for begin in range(0, size, self._region.size):
            part = into[begin : begin + self._region.size]
            np.copyto(part, self._region.bytes(len(part)))
        self.probed_bytes += size


def _damaged(header: DataHeader) -> ChecksumMismatch:
    return ChecksumMismatch(f"piece {header.sequence} arrived damaged")
