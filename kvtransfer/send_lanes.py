"""The sender's end of a connection's data lane, one class for each way that payload can travel.

Owns what is under way on one connection: credits, buffers, pieces that the receiver has not taken
yet. A box goes straight from the cache where its runs are long, and packed where they are short.
Knows nothing of when a transfer begins or fails.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from kvtransfer import wire
from kvtransfer.addresses import BlockTable, Memory
from kvtransfer.errors import ProtocolViolation
from kvtransfer.header import HEADER_BYTES, MEANT, DataHeader, seal, seal_over
from kvtransfer.layout import Box, Span
from kvtransfer.settings import MAX_PIECE_BYTES, MAX_SLOTS, TransferSettings
from kvtransfer.shared import Lease
from kvtransfer.slots import (
    MAX_CONNECTION,
    MAX_GENERATION,
    Bytes,
    SendSlots,
    data_tag,
    page_aligned,
)
from kvtransfer.stats import Counters
from kvtransfer.transport import Link

# Below this a run costs more as a part of its own than as bytes copied twice: in a system call
# that takes a list of parts, and in a loop over runs.
DIRECT_BYTES = 32 << 10
MAPPED_DIRECT_BYTES = 4 << 10
# What the lanes are called that the receiver reads.
CARRIERS = {wire.LaneKind.MAPPED: "mapped", wire.LaneKind.DEVICE: "gpu"}
# Pieces of a stream handed to the socket ahead of the kernel: one being sent, one to follow.
_STREAM_PIECES = 3


@dataclass(frozen=True, slots=True)
class Outpiece:
    """A box of one transfer, and where it lies."""

    header: DataHeader
    memory: Memory
    table: BlockTable
    box: Box

    def direct(self, shortest_bytes: int = DIRECT_BYTES) -> bool:
        """Whether its runs are long enough to be sent from where they lie."""
        return not self.box.part and self.memory.run_bytes(self.box) >= shortest_bytes

    def views(self) -> list[memoryview]:
        """Return the runs of the box."""
        return self.memory.views(self.table, self.box)

    def crc(self, crc: int) -> int:
        """Return `crc` continued over the box where it lies."""
        return self.memory.crc(self.table, self.box, crc)

    def pack(self, into: Bytes) -> memoryview:
        """Copy the box into a buffer, or a new one where it is too small; return what was filled.

        (A single layer of the smallest unit can be larger than a slot.)
        """
        size = self.header.payload_bytes
        payload = into[:size]
        if len(payload) < size:
            payload = page_aligned(size)
        self.memory.pack(payload, self.table, self.box)
        return memoryview(payload.data)


class SendLane(Protocol):
    """How one connection's payload goes out; for the agent's thread."""

    @property
    def carrier(self) -> str:
        """What carries it: "mapped", "tcp", "ucx/rc_mlx5"."""
        ...

    @property
    def can_send(self) -> bool:
        """Whether `send` may be called now."""
        ...

    def limit(self, run_bytes: int, unit_bytes: int) -> int:
        """Return the bytes that a piece may have, of such runs and with such a smallest part."""
        ...

    def send(self, piece: Outpiece) -> int:
        """Start a piece on its way; return its checksum."""
        ...

    def probe(self, size: int) -> None:
        """Send a piece that belongs to nothing, at most slot_bytes long."""
        ...

    def told(self, message: wire.Control) -> bool:
        """Take what the receiver says about the lane; False for what is not the lane's."""
        ...

    def done(self, key: Any) -> None:
        """An operation that the lane started on the link is terminal."""
        ...

    def drop(self, transfer_id: int) -> None:
        """Read no block of a transfer any more, from now on."""
        ...


class TaggedSend:
    """Messages packed into buffers and sent into slots that the receiver granted."""

    def __init__(
        self, link: Link, welcome: wire.Welcome, settings: TransferSettings, counters: Counters
    ) -> None:
        """Raises ProtocolViolation for a senseless welcome, TransferError where UCX cannot."""
        if not 0 < welcome.window <= MAX_SLOTS or welcome.connection >= MAX_CONNECTION:
            number = welcome.connection
            raise ProtocolViolation(f"connection {number} with a window of {welcome.window} slots")
        link.tagged.open(welcome.data_address)
        self._link = link
        self._counters = counters
        self._welcome = welcome
        self._bytes = min(welcome.slot_bytes, settings.slot_bytes)
        self.slots = SendSlots(welcome.window, self._bytes)
        self._credits: deque[tuple[int, int]] = deque()

    @property
    def carrier(self) -> str:
        """See SendLane."""
        return self._link.tagged.carrier

    @property
    def can_send(self) -> bool:
        """See SendLane."""
        return bool(self._credits) and bool(self.slots.free)

    def limit(self, run_bytes: int, unit_bytes: int) -> int:
        """See SendLane."""
        return self._bytes

    def send(self, piece: Outpiece) -> int:
        """See SendLane."""
        buffer = self._buffer()
        with self._counters.spent("pack_s"):
            payload = piece.pack(buffer[HEADER_BYTES:])
        return self._message(buffer, piece.header, payload)

    def probe(self, size: int) -> None:
        """See SendLane."""
        buffer = self._buffer()
        payload = buffer[HEADER_BYTES : HEADER_BYTES + size]
        self._message(buffer, probe_header(size), memoryview(payload.data))

    def _buffer(self) -> Bytes:
        buffer = self.slots.take()
        assert buffer is not None, "send while the lane cannot"
        return buffer

    def _message(self, buffer: Bytes, header: DataHeader, payload: memoryview) -> int:
        slot, generation = self._credits.popleft()
        header = replace(header, slot=slot, generation=generation)
        with self._counters.spent("checksum_s"):
            head, crc = seal(header, (payload,), checksum=self._welcome.checksum)
        buffer[:HEADER_BYTES] = np.frombuffer(head, np.uint8)
        tag = data_tag(self._welcome.epoch, self._welcome.connection, slot, generation)
        self._link.tagged.send(
            tag, buffer[: HEADER_BYTES + len(payload)], (self, (buffer, time.perf_counter()))
        )
        return crc

    def told(self, message: wire.Control) -> bool:
        """See SendLane."""
        if not isinstance(message, wire.Credit):
            return False
        if len(self._credits) + len(message.slots) > self.slots.count:
            raise ProtocolViolation("more credits than slots")
        for slot, generation in message.slots:
            if slot >= self.slots.count or generation >= MAX_GENERATION:
                raise ProtocolViolation("a credit for a slot or generation that does not exist")
        self._credits.extend(message.slots)
        return True

    def done(self, key: Any) -> None:
        """See SendLane."""
        buffer, started = key
        self._counters.add("wire_s", time.perf_counter() - started)
        self.slots.give_back(buffer)

    def drop(self, transfer_id: int) -> None:
        """See SendLane: what is under way lies in buffers of the lane's own."""


class StreamSend:
    """Pieces written to the link's stream, header first."""

    def __init__(
        self, link: Link, welcome: wire.Welcome, settings: TransferSettings, counters: Counters
    ) -> None:
        self._link = link
        self._counters = counters
        self._checksum = welcome.checksum
        self._settings = settings
        self.slots = SendSlots(_STREAM_PIECES, settings.slot_bytes)
        # By number: the transfer whose blocks are being read or the buffer that was packed, and
        # since when.
        self._under_way: dict[int, tuple[int | Bytes, float]] = {}
        self._number = 0

    @property
    def carrier(self) -> str:
        """See SendLane."""
        return self._link.stream_carrier

    @property
    def can_send(self) -> bool:
        """See SendLane."""
        return len(self._under_way) < _STREAM_PIECES

    def limit(self, run_bytes: int, unit_bytes: int) -> int:
        """See SendLane."""
        settings = self._settings
        most = settings.slot_bytes if run_bytes < DIRECT_BYTES else settings.piece_bytes
        return max(most, min(unit_bytes, MAX_PIECE_BYTES))

    def send(self, piece: Outpiece) -> int:
        """See SendLane."""
        parts: Sequence[memoryview]
        reads: int | Bytes
        if piece.direct():
            parts, reads = piece.views(), piece.header.transfer_id
        else:
            buffer = self.slots.take()
            assert buffer is not None, "send while the lane cannot"
            with self._counters.spent("pack_s"):
                parts, reads = (piece.pack(buffer),), buffer
        with self._counters.spent("checksum_s"):
            head, crc = seal(piece.header, parts, checksum=self._checksum)
        self._start(head, parts, reads)
        return crc

    def probe(self, size: int) -> None:
        """See SendLane."""
        buffer = self.slots.take()
        assert buffer is not None, "send while the lane cannot"
        payload = memoryview(buffer[:size].data)
        head, _ = seal(probe_header(size), (payload,), checksum=False)
        self._start(head, (payload,), buffer)

    def _start(self, head: bytes, parts: Sequence[memoryview], reads: int | Bytes) -> None:
        self._number += 1
        self._under_way[self._number] = reads, time.perf_counter()
        self._link.stream.send((memoryview(head), *parts, memoryview(MEANT)), (self, self._number))

    def told(self, message: wire.Control) -> bool:
        """See SendLane."""
        return False

    def done(self, key: Any) -> None:
        """See SendLane."""
        read, started = self._under_way.pop(key)
        self._counters.add("wire_s", time.perf_counter() - started)
        if not isinstance(read, int):
            self.slots.give_back(read)

    def drop(self, transfer_id: int) -> None:
        """See SendLane."""
        for number, (reads, _) in self._under_way.items():
            if isinstance(reads, int) and reads == transfer_id:
                self._link.stream.divert((self, number))


class MappedSend:
    """Pieces announced only: the receiver reads them out of this process's cache, or its GPU's."""

    def __init__(
        self, link: Link, welcome: wire.Welcome, settings: TransferSettings, counters: Counters
    ) -> None:
        self._link = link
        self._counters = counters
        self._welcome = welcome
        self._settings = settings
        self._scratch = page_aligned(settings.slot_bytes if welcome.checksum else 0)
        # When each piece was announced that the receiver has not taken yet.
        self._not_taken: deque[float] = deque()

    @property
    def carrier(self) -> str:
        """See SendLane."""
        return CARRIERS[self._welcome.lane]

    @property
    def can_send(self) -> bool:
        """See SendLane."""
        return len(self._not_taken) < self._welcome.window

    def limit(self, run_bytes: int, unit_bytes: int) -> int:
        """See SendLane."""
        if self._welcome.lane is wire.LaneKind.DEVICE:
            return MAX_PIECE_BYTES  # a launch costs more than what it copies
        # While the receiver has nothing to do, a small piece gives it something sooner.
        packed = run_bytes < MAPPED_DIRECT_BYTES and self._welcome.checksum
        small = packed or not self._not_taken
        most = self._settings.slot_bytes if small else self._settings.piece_bytes
        return max(most, min(unit_bytes, MAX_PIECE_BYTES))

    def name(
        self, transfer_id: int, nonce: bytes, lease: Lease, group: int, ids: Sequence[int]
    ) -> None:
        """Tell where a transfer's blocks lie, before its first piece."""
        for first in range(0, len(ids), wire.TABLE_IDS):
            part = tuple(ids[first : first + wire.TABLE_IDS])
            table = wire.Table(transfer_id, nonce, lease, group, first, part)
            self._link.send_control(wire.encode(table))

    def send(self, piece: Outpiece) -> int:
        """See SendLane."""
        parts: Sequence[memoryview] = ()
        direct = piece.direct(MAPPED_DIRECT_BYTES)
        if self._welcome.checksum and not direct:
            with self._counters.spent("pack_s"):
                parts = (piece.pack(self._scratch),)
        with self._counters.spent("checksum_s"):
            if self._welcome.checksum and direct:
                head, crc = seal_over(piece.header, piece.crc)
            else:
                head, crc = seal(piece.header, parts, checksum=self._welcome.checksum)
        self._not_taken.append(time.perf_counter())
        self._link.send_control(wire.encode(wire.Piece(head)))
        return crc

    def probe(self, size: int) -> None:
        """See SendLane: the receiver reads by itself when it is asked to."""

    def told(self, message: wire.Control) -> bool:
        """See SendLane."""
        if not isinstance(message, wire.Taken):
            return False
        if message.count > len(self._not_taken):
            raise ProtocolViolation("more pieces taken than were announced")
        now = time.perf_counter()
        for _ in range(message.count):
            self._counters.add("wire_s", now - self._not_taken.popleft())
        return True

    def done(self, key: Any) -> None:
        """See SendLane: nothing is ever started on the link."""

    def drop(self, transfer_id: int) -> None:
        """See SendLane: the end of the transfer's lease makes late reads worthless."""


def probe_header(size: int) -> DataHeader:
    """Return the header of a piece that only shows how fast the lane is."""
    one = Span(0, 1)
    return DataHeader(
        epoch=0,
        transfer_id=0,
        nonce=bytes(16),
        source_rank=0,
        slot=0,
        generation=0,
        sequence=0,
        group=0,
        layers=one,
        heads=one,
        tokens=one,
        payload_bytes=size,
        probe=True,
    )
