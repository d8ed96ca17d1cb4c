"""One granted transfer as the receiver sees it: what is missing, what arrived, what was claimed.

Owns the checks of one transfer. Pure bookkeeping: no I/O, no events, no clock of its own.
"""

import hmac
from dataclasses import dataclass, field

from kvtransfer.api import ReceiveGrant
from kvtransfer.coverage import Coverage
from kvtransfer.errors import GrantRefused, ManifestMismatch, ProtocolViolation
from kvtransfer.memory import BlockTable
from kvtransfer.plan import Plan, regions
from kvtransfer.wire import DataHeader, Manifest, manifest_crc


@dataclass(slots=True)
class Source:
    """What one source rank owes under the grant."""

    coverage: Coverage
    checksums: dict[int, int] = field(default_factory=dict)
    bytes: int = 0
    manifest: Manifest | None = None
    manifest_at: float = 0.0
    connection: int | None = None
    confirmed: bool = False


@dataclass(slots=True)
class Incoming:
    """One grant, its blocks, and the state of every source rank."""

    grant: ReceiveGrant
    table: BlockTable
    unit: int
    deadline: float
    sources: dict[int, Source]
    started_at: float = 0.0
    carrier: str = ""

    @classmethod
    def begin(
        cls, grant: ReceiveGrant, table: BlockTable, plan: Plan, rank: int, now: float
    ) -> "Incoming":
        """Return the transfer with nothing arrived yet."""
        boxes = regions(plan.for_target(rank))
        ranks = {box.source_rank for box in boxes}
        sources = {
            source: Source(Coverage([b for b in boxes if b.source_rank == source], plan.unit))
            for source in sorted(ranks)
        }
        return cls(grant, table, plan.unit, now + grant.ttl_s, sources)

    def source_for(self, instance: str, rank: int, nonce: bytes) -> Source:
        """Return the source that a message belongs to; raises GrantRefused for a forged one."""
        if not hmac.compare_digest(nonce, self.grant.nonce):
            raise GrantRefused("the nonce is not the grant's")
        if instance != self.grant.source_instance:
            raise GrantRefused(f"the grant is not for instance {instance}")
        source = self.sources.get(rank)
        if source is None:
            raise GrantRefused(f"rank {rank} has nothing to send under this grant")
        return source

    def accept(self, source: Source, header: DataHeader, crc: int, now: float) -> None:
        """Count one checked message; raises ProtocolViolation for one that must not come (again).

        After this the payload must be scattered.
        """
        if source.confirmed or header.sequence in source.checksums:
            raise ProtocolViolation(f"message {header.sequence} arrived already")
        wrong = source.coverage.take(header.layers, header.heads, header.tokens)
        if wrong:
            raise ProtocolViolation(wrong)
        source.checksums[header.sequence] = crc
        source.bytes += header.payload_bytes
        self.started_at = self.started_at or now

    def confirm(self, source: Source) -> bool:
        """Whether the source is complete; raises ManifestMismatch where its manifest is wrong."""
        if source.manifest is None or source.coverage.missing_units:
            return False
        count = len(source.checksums)
        in_order = [source.checksums.get(i) for i in range(count)]
        checksums = [crc for crc in in_order if crc is not None]
        found = (count, source.bytes, manifest_crc(checksums))
        said = (source.manifest.pieces, source.manifest.bytes, source.manifest.crc32)
        if found != said or len(checksums) != count:
            raise ManifestMismatch(
                f"source rank {source.manifest.source_rank} says (messages, bytes, crc32) {said}, "
                f"arrived {found}"
            )
        source.confirmed = True
        return True

    @property
    def complete(self) -> bool:
        """Whether every source rank is confirmed."""
        return all(source.confirmed for source in self.sources.values())

    @property
    def bytes(self) -> int:
        """Payload bytes so far."""
        return sum(source.bytes for source in self.sources.values())

    @property
    def messages(self) -> int:
        """Messages so far."""
        return sum(len(source.checksums) for source in self.sources.values())
