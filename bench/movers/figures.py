"""What was measured of one work over one carrier, and the rows that a report makes of it. Pure.

A row's limit is what the machine allows. Over shared memory that is memcpy for slices of 1 MiB and
more; else it is ucx_perftest, whose buffer stays hot, and which is run with messages of at least
64 KiB, because several small slices may share one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.movers.ours import Mode
from bench.movers.works import KIB, MIB, Carrier, Work
from bench.report import Row, median_and_spread

_LARGE_SLICE_BYTES = MIB
_LIMIT_MESSAGE_BYTES = 64 * KIB


def limit_message_bytes(work: Work) -> int:
    """Return the message size at which UCX's limit is measured for this work."""
    return max(work.slice_bytes, _LIMIT_MESSAGE_BYTES)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One way's speed: GB/s (of 10^9 bytes) of each round kept, two at least."""

    name: str
    gbps: tuple[float, ...]

    @classmethod
    def of_seconds(cls, name: str, work: Work, seconds: Iterable[float]) -> "Figure":
        """Return the figure of rounds that took so long each."""
        return cls(name=name, gbps=tuple(work.bytes / one / 1e9 for one in seconds))

    @property
    def median(self) -> float:
        """GB/s of the middle round."""
        return median_and_spread(self.gbps)[0]

    @property
    def spread(self) -> float:
        """GB/s between the quartiles."""
        return median_and_spread(self.gbps)[1]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All ways of one work over one carrier; `slices` is one message a slice."""

    work: Work
    carrier: Carrier
    memcpy: Figure
    perftest: Figure
    slices: Figure | None = None
    peers: tuple[Figure, ...] = ()
    ours: Mapping[Mode, Figure] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What a row is called, without the mode."""
        return row_name(self.work, self.carrier)

    @property
    def limit(self) -> Figure:
        """What the machine allows."""
        large = self.work.slice_bytes >= _LARGE_SLICE_BYTES
        return self.memcpy if large and self.carrier.name == "shm" else self.perftest

    @property
    def best_peer(self) -> Figure | None:
        """The peer's fastest mode; None where no peer ran."""
        return max(self.peers, key=lambda figure: figure.median, default=None)

    @property
    def every_way(self) -> tuple[Figure, ...]:
        """All figures, limits first."""
        slices = (self.slices,) if self.slices else ()
        return (self.memcpy, self.perftest, *slices, *self.peers, *self.ours.values())


def row_name(work: Work, carrier: Carrier) -> str:
    """Return what `--rows` patterns are matched with."""
    return f"{work.name}, {carrier.name}"


def rows(measured: Sequence[Measured]) -> list[Row]:
    """Return a row for each mode of ours, beside the peer's best, and beside plain messages."""
    made = []
    for one in measured:
        for mode, ours in one.ours.items():
            made.append(_row(f"{one.name}, {mode}", one, ours, one.best_peer))
            if mode == "raw" and one.slices:
                name = f"{one.name}, {mode}, beside a message a slice"
                made.append(_row(name, one, ours, one.slices))
    return made


def _row(name: str, one: Measured, ours: Figure, peer: Figure | None) -> Row:
    """A request's row says how long it takes, any other how fast it is."""
    in_time = one.work.request is not None
    samples = [_ms(one.work, gbps) for gbps in ours.gbps] if in_time else ours.gbps
    median, spread = median_and_spread(samples)
    limit, beside = one.limit.median, peer.median if peer else None
    return Row(
        row=name,
        ours=median,
        unit="ms" if in_time else "GB/s",
        higher_is_better=not in_time,
        limit=_ms(one.work, limit) if in_time else limit,
        peer=_ms(one.work, beside) if in_time and beside else beside,
        peer_name=peer.name if peer else None,
        spread=spread,
    )


def _ms(work: Work, gbps: float) -> float:
    return work.bytes / gbps / 1e6
