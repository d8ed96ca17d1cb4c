"""One granted transfer as the receiver sees it: what is missing, what arrived, what was claimed.

Owns the checks of one transfer. Pure bookkeeping: no I/O, no events, no clock of its own.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtransfer.addresses import BlockTable
from kvtransfer.api import Kept, ReceiveGrant
from kvtransfer.coverage import Coverage, kept_tokens
from kvtransfer.errors import GrantRefused, ManifestMismatch, ProtocolViolation
from kvtransfer.header import DataHeader, manifest_crc
from kvtransfer.layout import CacheLayout
from kvtransfer.plan import Plan
from kvtransfer.wire import Manifest


@dataclass(slots=True)
class Source:
    """What one source rank owes under the grant, by cache group."""

    coverage: tuple[Coverage, ...]
    checksums: dict[int, int] = field(default_factory=dict)
    bytes: int = 0
    manifest: Manifest | None = None
    manifest_at: float = 0.0
    connection: int | None = None
    confirmed: bool = False

    @property
    def missing_units(self) -> int:
        """Units of layers that have not arrived."""
        return sum(coverage.missing_units for coverage in self.coverage)


@dataclass(slots=True)
class Incoming:
    """One grant, its blocks, and the state of every source rank."""

    grant: ReceiveGrant
    layout: CacheLayout
    tables: tuple[BlockTable, ...]
    plans: tuple[Plan, ...]
    rank: int
    deadline: float
    sources: dict[int, Source]
    started_at: float = 0.0
    carrier: str = ""

    @classmethod
    def begin(
        cls,
        grant: ReceiveGrant,
        layout: CacheLayout,
        tables: tuple[BlockTable, ...],
        plans: tuple[Plan, ...],
        rank: int,
        now: float,
    ) -> "Incoming":
        """Return the transfer with nothing arrived yet."""
        ranks = {box.source_rank for plan in plans for box in plan.for_target(rank)}
        sources = {
            source: Source(
                tuple(
                    Coverage(
                        [box for box in plan.for_target(rank) if box.source_rank == source],
                        plan.unit,
                    )
                    for plan in plans
                )
            )
            for source in sorted(ranks)
        }
        return cls(grant, layout, tables, plans, rank, now + grant.ttl_s, sources)

    @property
    def units(self) -> Sequence[int]:
        """Each cache group's unit: tokens of the smallest grain both sides share."""
        return [plan.unit for plan in self.plans]

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

    def check(self, source: Source, header: DataHeader) -> None:
        """Raise ProtocolViolation for a piece that must not come, or not again."""
        if source.confirmed or header.sequence in source.checksums:
            raise ProtocolViolation(f"piece {header.sequence} arrived already")
        coverage = source.coverage[header.group]
        wrong = coverage.refusal(header.layers, header.heads, header.tokens)
        if wrong:
            raise ProtocolViolation(wrong)

    def accept(self, source: Source, header: DataHeader, crc: int) -> None:
        """Count a checked piece whose bytes are in place."""
        source.coverage[header.group].take(header.layers, header.heads, header.tokens)
        source.checksums[header.sequence] = crc
        source.bytes += header.payload_bytes

    def kept(self) -> Kept:
        """What of the sequence is complete on this rank: tokens by cache group and layer."""
        grant = self.grant
        return tuple(
            kept_tokens(
                layout,
                grant.tokens,
                grant.total_tokens,
                [source.coverage[group] for source in self.sources.values()],
            )
            for group, layout in enumerate(self.layout.groups)
        )

    def confirm(self, source: Source) -> bool:
        """Whether the source is complete; raises ManifestMismatch where its manifest is wrong."""
        if source.manifest is None or source.missing_units:
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
