"""The receiver's end of a mapped lane: reads pieces out of the sender's cache.

Owns the tables of the blocks that the sender has told, and the check that it still held them when
they had been read.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

from kvtransfer import wire
from kvtransfer.addresses import BlockTable, Memory
from kvtransfer.errors import ProtocolViolation, StaleRead, TransferError
from kvtransfer.header import crc_of_head, unseal
from kvtransfer.layout import CacheLayout
from kvtransfer.mapped_caches import Caches
from kvtransfer.receive_lanes import Landing, Place, damaged
from kvtransfer.send_lanes import MAPPED_DIRECT_BYTES
from kvtransfer.settings import MAX_PIECE_BYTES
from kvtransfer.shared import Lease
from kvtransfer.slots import SlotState, page_aligned

_TABLES = 4096


@dataclass(slots=True)
class _Named:
    """Where a transfer's blocks lie in the sender's memory, as far as it has told."""

    lease: Lease
    ids: dict[int, list[int]] = field(default_factory=dict)
    tables: dict[int, BlockTable] = field(default_factory=dict)


class MappedReceive:
    """Pieces read from the sender's caches, which this process reaches."""

    def __init__(self, place: Place, caches: Caches) -> None:
        self._place = place
        self._caches = caches
        self._memories: dict[tuple[CacheLayout, int], Memory] = {}
        self._named: OrderedDict[tuple[int, bytes], _Named] = OrderedDict()
        self._scratch = page_aligned(0)
        self._taken = 0
        self.probed_bytes = 0
        self.probe_s = 0.0

    @property
    def carrier(self) -> str:
        """See ReceiveLane."""
        return self._caches.carrier

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
        if table.group >= len(self._caches.blocks) or named.lease != table.lease:
            raise ProtocolViolation("a table of a group or lease that does not exist")
        ids = named.ids.setdefault(table.group, [])
        blocks = self._caches.blocks[table.group]
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
        theirs = memory.run_bytes(landing.box)
        long = landing.direct(MAPPED_DIRECT_BYTES) and theirs >= MAPPED_DIRECT_BYTES
        if head is None or long:
            begun = None if head is None else crc_of_head(head)
            with self._place.counters.spent("scatter_s"):
                crc = landing.memory.copy_from(memory, table, landing.table, landing.box, begun)
            self._check_lease(named)
            if crc is not None and crc != landing.crc:
                raise damaged(h)
            return
        if len(self._scratch) < h.payload_bytes:
            self._scratch = page_aligned(h.payload_bytes)
        payload = self._scratch[: h.payload_bytes]
        with self._place.counters.spent("pack_s"):
            memory.pack(payload, table, landing.box)
        self._check_lease(named)
        if not self._place.verified(head, (memoryview(payload.data),), landing.crc):
            raise damaged(h)
        self._place.scatter(landing, memoryview(payload.data))

    def _check_lease(self, named: _Named) -> None:
        if not self._caches.stands(named.lease):
            raise StaleRead("the sender let its blocks go before they were read")

    def _memory(self, landing: Landing, group: int) -> Memory:
        key = (landing.source_layout, group)
        if key not in self._memories:
            layout = landing.source_layout.groups[group]
            self._memories[key] = self._caches.memory(group, layout, self._place.rank)
        return self._memories[key]

    def _probe(self, size: int) -> None:
        """Read so many bytes, twice, so that what is timed has its pages: serving meets each of
        them once only.
        """
        for _ in range(2):
            self.probe_s = self._caches.probe(min(size, MAX_PIECE_BYTES))
        self.probed_bytes += size
