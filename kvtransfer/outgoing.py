"""One transfer as the sender sees it: what is ready, what is cut into messages, what is left.

Owns cutting and merging of boxes. Pure bookkeeping: no I/O, no events, no clock of its own.
"""

from collections import deque
from dataclasses import dataclass, field

from kvtransfer.api import SendTransfer
from kvtransfer.coverage import Ready
from kvtransfer.layout import Span
from kvtransfer.memory import BlockTable
from kvtransfer.plan import Plan, Region, regions
from kvtransfer.wire import manifest_crc


@dataclass(frozen=True, slots=True)
class Box:
    """K and V of some layers, heads and tokens: what one message carries."""

    region: Region
    layers: Span
    tokens: Span


@dataclass(slots=True)
class Lane:
    """What one transfer owes to one target rank."""

    target_rank: int
    unit: int
    regions: tuple[Region, ...]
    ready: dict[tuple[Region, int], Ready]
    missing_units: int
    queue: deque[Box] = field(default_factory=deque)
    checksums: list[int] = field(default_factory=list)
    bytes: int = 0
    manifest_at: float | None = None
    acked: bool = False

    @classmethod
    def of(cls, target_rank: int, boxes: tuple[Region, ...], unit: int) -> "Lane":
        """Return a lane with nothing ready yet."""
        return cls(
            target_rank,
            unit,
            boxes,
            {(box, layer): Ready(box.tokens, unit) for box in boxes for layer in box.layers},
            sum(len(box.layers) * -(-len(box.tokens) // unit) for box in boxes),
        )

    def add_ready(self, layers: Span, tokens: Span) -> None:
        """Queue what has become sendable because compute finished `tokens` of `layers`."""
        for region in self.regions:
            for layer in region.layers.meet(layers):
                for part in self.ready[region, layer].add(tokens):
                    self.queue.append(Box(region, Span(layer, layer + 1), part))

    def next_box(self, max_units: int) -> Box:
        """Take the next message off the queue, at most `max_units` layer-units.

        A box too large is cut; a small one takes the following layers of the same tokens along
        if they are ready. Nothing waits for more to become ready.
        """
        box = self.queue.popleft()
        units = self._units(box.tokens)
        if units > max_units:
            at = box.tokens.begin + max_units * self.unit
            self.queue.appendleft(Box(box.region, box.layers, Span(at, box.tokens.end)))
            box = Box(box.region, box.layers, Span(box.tokens.begin, at))
            units = max_units
        layers = box.layers
        while self.queue and (len(layers) + 1) * units <= max_units:
            following = self.queue[0]
            if following.region is not box.region or following.tokens != box.tokens:
                break
            if following.layers.begin != layers.end:
                break
            layers = Span(layers.begin, following.layers.end)
            self.queue.popleft()
        self.missing_units -= len(layers) * units
        return Box(box.region, layers, box.tokens)

    def _units(self, tokens: Span) -> int:
        return -(-len(tokens) // self.unit)

    @property
    def checksum(self) -> int:
        """The manifest's crc32 over all messages' checksums."""
        return manifest_crc(self.checksums)


@dataclass(slots=True)
class Outgoing:
    """One sequence's KV on its way to every target rank that the plan names."""

    transfer: SendTransfer
    table: BlockTable
    unit: int
    began_at: float
    deadline: float
    lanes: dict[int, Lane]
    started_at: float = 0.0
    carrier: str = ""

    @classmethod
    def begin(
        cls, transfer: SendTransfer, table: BlockTable, plan: Plan, rank: int, now: float
    ) -> "Outgoing":
        """Return the transfer with nothing ready yet."""
        boxes = regions(plan.for_source(rank))
        lanes = {
            target: Lane.of(target, tuple(b for b in boxes if b.target_rank == target), plan.unit)
            for target in sorted({box.target_rank for box in boxes})
        }
        return cls(transfer, table, plan.unit, now, now + transfer.ttl_s, lanes)

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
        """Messages sent so far."""
        return sum(len(lane.checksums) for lane in self.lanes.values())
