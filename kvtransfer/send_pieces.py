"""Makes pieces of what is ready and sends them on a connection's lane.

Owns where a transfer is cut, and what goes before its first piece and after its last. Knows nothing
of whose turn it is or of deadlines.
"""

from collections.abc import Callable, Sequence

from kvtransfer import wire
from kvtransfer.addresses import Memory
from kvtransfer.errors import LayoutMismatch
from kvtransfer.header import DataHeader
from kvtransfer.outbound import Session
from kvtransfer.outgoing import Lane, Outgoing
from kvtransfer.send_lanes import MappedSend, Outpiece
from kvtransfer.shared import SharedRegion


class PieceSender:
    """Sends one rank's memory, piece by piece; for its agent's thread."""

    def __init__(
        self,
        memories: Sequence[Memory],
        region: SharedRegion | None,
        rank: int,
        clock: Callable[[], float],
    ) -> None:
        self._memories = memories
        self._region = region
        self._rank = rank
        self._clock = clock

    def send(self, session: Session, outgoing: Outgoing, lane: Lane) -> bool:
        """Send the next piece of what is ready; whether it was the last one of this lane.

        Raises LayoutMismatch where the smallest piece is too large for the session.
        """
        self._name_blocks(session, outgoing, lane)
        piece = self._cut(session, outgoing, lane)
        lane.checksums.append(session.lane.send(piece))
        lane.bytes += piece.header.payload_bytes
        session.bytes += piece.header.payload_bytes
        session.messages += 1
        session.moved_at = self._clock()
        if lane.missing_units:
            return False
        self._send_manifest(session, outgoing, lane)
        return True

    def _cut(self, session: Session, outgoing: Outgoing, lane: Lane) -> Outpiece:
        transfer, first = outgoing.transfer, lane.queue[0]
        memory, unit = self._memories[first.group], first.box.unit
        layer_unit = unit * memory.token_bytes(first.box.heads)
        # A part-filled unit is packed whatever its runs: it has to fit a buffer.
        run_bytes = 0 if first.box.part else memory.run_bytes(first.box)
        limit = session.lane.limit(run_bytes, layer_unit)
        if limit < layer_unit:
            raise LayoutMismatch(f"pieces of {limit} bytes do not hold {unit} tokens of one layer")
        due = lane.next_due(limit // layer_unit)
        header = DataHeader(
            epoch=transfer.epoch,
            transfer_id=transfer.transfer_id,
            nonce=transfer.nonce,
            source_rank=self._rank,
            slot=0,
            generation=0,
            sequence=len(lane.checksums),
            group=due.group,
            layers=due.box.layers,
            heads=due.box.heads,
            tokens=due.box.tokens,
            payload_bytes=memory.payload_bytes(due.box),
        )
        return Outpiece(header, memory, outgoing.tables[due.group], due.box)

    def _name_blocks(self, session: Session, outgoing: Outgoing, lane: Lane) -> None:
        """Where the receiver reads for itself, tell it the blocks, under a lease."""
        if lane.named or not isinstance(session.lane, MappedSend) or self._region is None:
            return
        lane.named = True
        if outgoing.lease is None:
            outgoing.lease = self._region.lease()
        transfer = outgoing.transfer
        for group, table in enumerate(outgoing.tables):
            ids = table.ids.tolist()
            session.lane.name(transfer.transfer_id, transfer.nonce, outgoing.lease, group, ids)

    def _send_manifest(self, session: Session, outgoing: Outgoing, lane: Lane) -> None:
        transfer = outgoing.transfer
        lane.manifest_at = self._clock()
        outgoing.carrier = session.carrier
        manifest = wire.Manifest(
            transfer_id=transfer.transfer_id,
            epoch=transfer.epoch,
            nonce=transfer.nonce,
            source_rank=self._rank,
            pieces=len(lane.checksums),
            bytes=lane.bytes,
            crc32=lane.checksum,
        )
        session.link.send_control(wire.encode(manifest))
