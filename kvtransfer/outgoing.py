"""One transfer as the sender sees it: what is ready, what is cut into pieces, what is left.

Owns cutting and merging of boxes. Pure bookkeeping: no I/O, no events, no clock of its own.
"""

from collections import deque
from dataclasses import dataclass, field, replace

from kvtransfer.addresses import BlockTable
from kvtransfer.api import SendTransfer
from kvtransfer.coverage import Ready
from kvtransfer.header import manifest_crc
from kvtransfer.layout import Box, CacheLayout, Span
from kvtransfer.plan import Plan, Region
from kvtransfer.shared import Lease


@dataclass(frozen=True, slots=True)
class Due:
    """What one piece carries of a cache group, within one of the plan's regions."""

    group: int
    region: Region
    box: Box


@dataclass(slots=True)
class Lane:
    """What one transfer owes to one target rank."""

    target_rank: int
    ready: list[tuple[int, int, Region, dict[int, Ready]]]
    missing_units: int
    queue: deque[Due] = field(default_factory=deque)
    checksums: list[int] = field(default_factory=list)
    bytes: int = 0
    manifest_at: float | None = None
    acked: bool = False
    named: bool = False

    @classmethod
    def of(cls, target_rank: int, owed: list[tuple[int, int, Region]]) -> "Lane":
        """Return a lane that owes (group, unit, region)s, with nothing ready yet."""
        return cls(
            target_rank,
            [
                (group, unit, box, {layer: Ready(box.tokens, unit) for layer in box.layers})
                for group, unit, box in owed
            ],
            sum(len(r.layers) * -(-len(r.tokens) // unit) for _, unit, r in owed),
        )

    def add_ready(self, group: int, layers: Span, tokens: Span) -> None:
        """Queue what has become sendable because compute finished `tokens` of `layers`."""
        for of_group, unit, region, ready in self.ready:
            if of_group != group:
                continue
            for layer in region.layers.meet(layers):
                for part in ready[layer].add(tokens):
                    whole = part.begin + len(part) // unit * unit
                    # A last, part-filled unit goes by itself: it has to be packed, the rest not.
                    for span in (Span(part.begin, whole), Span(whole, part.end)):
                        if len(span):
                            box = Box(Span(layer, layer + 1), region.heads, span, unit)
                            self.queue.append(Due(group, region, box))

    def next_due(self, max_units: int) -> Due:
        """Take the next piece off the queue, at most `max_units` layer-units.

        A box too large is cut; a small one takes the following layers of the same tokens along
        if they are ready. Nothing waits for more to become ready.
        """
        due = self.queue.popleft()
        box = due.box
        if box.units > max_units:
            at = box.tokens.begin + max_units * box.unit
            rest = replace(box, tokens=Span(at, box.tokens.end))
            self.queue.appendleft(replace(due, box=rest))
            box = replace(box, tokens=Span(box.tokens.begin, at))
        layers = box.layers
        skipped: list[Due] = []
        while self.queue and (len(layers) + 1) * box.units <= max_units:
            following = self.queue[0]
            if following.region is not due.region or following.box.layers.begin > layers.end:
                break
            self.queue.popleft()
            if following.box.tokens == box.tokens and following.box.layers.begin == layers.end:
                layers = Span(layers.begin, following.box.layers.end)
            else:
                skipped.append(following)
        self.queue.extendleft(reversed(skipped))
        self.missing_units -= len(layers) * box.units
        return replace(due, box=replace(box, layers=layers))

    @property
    def checksum(self) -> int:
        """The manifest's crc32 over all pieces' checksums."""
        return manifest_crc(self.checksums)


@dataclass(slots=True)
class Outgoing:
    """One sequence's KV on its way to every target rank that the plan names."""

    transfer: SendTransfer
    layout: CacheLayout
    tables: tuple[BlockTable, ...]
    began_at: float
    deadline: float
    lanes: dict[int, Lane]
    lease: Lease | None = None
    started_at: float = 0.0
    hidden_bytes: int = 0
    carrier: str = ""

    @classmethod
    def begin(
        cls,
        transfer: SendTransfer,
        layout: CacheLayout,
        tables: tuple[BlockTable, ...],
        plans: tuple[Plan, ...],
        rank: int,
        now: float,
    ) -> "Outgoing":
        """Return the transfer with nothing ready yet."""
        owed: dict[int, list[tuple[int, int, Region]]] = {}
        for group, plan in enumerate(plans):
            for region in plan.for_source(rank):
                owed.setdefault(region.target_rank, []).append((group, plan.unit, region))
        lanes = {target: Lane.of(target, owed[target]) for target in sorted(owed)}
        return cls(transfer, layout, tables, now, now + transfer.ttl_s, lanes)

    def add_ready(self, layers: Span, tokens: Span, group: int) -> None:
        """Note what compute has finished of one group: `tokens` are the sequence's."""
        part, _ = self.layout.groups[group].group_tokens(tokens, self.transfer.total_tokens)
        for lane in self.lanes.values():
            lane.add_ready(group, layers, part)

    @property
    def complete(self) -> bool:
        """Whether every target rank has acknowledged."""
        return all(lane.acked for lane in self.lanes.values())

    @property
    def bytes(self) -> int:
        """Payload bytes sent so far."""
        return sum(lane.bytes for lane in self.lanes.values())

    @property
    def messages(self) -> int:
        """Pieces sent so far."""
        return sum(len(lane.checksums) for lane in self.lanes.values())
