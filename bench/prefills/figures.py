"""From seconds to a report's rows. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from bench.prefills.ring import hidden_share
from bench.prefills.works import Work
from bench.report import Row, median_and_spread

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What one way made of a work: seconds of each round, and its peak resident memory."""

    name: str
    seconds: Sequence[float]
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """One work by one model; `limit_s` is what its matrix products take alone."""

    name: str
    work: Work
    limit_s: float
    ours: Computed
    peers: Sequence[Computed]

    def rows(self) -> list[Row]:
        """Return our speed beside each peer's and, for a long work, the memory of both."""
        return [*self._speeds(), *(self._memory() if self.work.is_long else [])]

    def _speeds(self) -> list[Row]:
        ours, spread = median_and_spread(self._speed(self.ours.seconds))
        alone = Row(
            row=self.name,
            ours=ours,
            unit="tokens/s",
            higher_is_better=True,
            limit=self.work.all_tokens / self.limit_s,
            spread=spread,
        )
        return [
            replace(
                alone,
                row=f"{self.name}, beside {peer.name.split()[0]}",
                peer=median_and_spread(self._speed(peer.seconds))[0],
                peer_name=peer.name,
            )
            for peer in self.peers
        ] or [alone]

    def _memory(self) -> list[Row]:
        return [
            Row(
                row=f"{self.name}, peak memory, beside {peer.name.split()[0]}",
                ours=self.ours.peak_bytes / MIB,
                unit="MiB",
                higher_is_better=False,
                peer=peer.peak_bytes / MIB,
                peer_name=peer.name,
            )
            for peer in self.peers
        ]

    def _speed(self, seconds: Sequence[float]) -> list[float]:
        return [self.work.all_tokens / one for one in seconds]


def attention_row(
    name: str, flops: int, limit_s: float, ours_s: Sequence[float], torch_s: Sequence[float]
) -> Row:
    """Return the speed of one layer's attention beside torch's own, in operations it needs."""
    ours, spread = median_and_spread([flops / one / 1e9 for one in ours_s])
    return Row(
        row=name,
        ours=ours,
        unit="GFLOP/s",
        higher_is_better=True,
        limit=flops / limit_s / 1e9,
        peer=median_and_spread([flops / one / 1e9 for one in torch_s])[0],
        peer_name="torch SDPA",
        spread=spread,
    )


@dataclass(kw_only=True)
class RingRounds:
    """A prompt on two ranks of a thread each, and on one of two: an entry for each round.

    Attributes:
        waited_s: That a rank stood still for messages, on average.
        alone_s: That the same messages take alone, on average.
        sent_bytes: By all ranks together.
    """

    name: str
    tokens: int
    expected_bytes: int
    ring_s: list[float] = field(default_factory=list)
    one_rank_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    alone_s: list[float] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)

    def rows(self) -> list[Row]:
        """Return speed, bytes beside the formula, and the share of communication hidden."""
        speed, spread = median_and_spread([self.tokens / one for one in self.ring_s])
        one_rank, _ = median_and_spread([self.tokens / one for one in self.one_rank_s])
        shares = [
            100 * hidden_share(waited, alone)
            for waited, alone in zip(self.waited_s, self.alone_s, strict=True)
        ]
        hidden, hidden_spread = median_and_spread(shares)
        return [
            Row(
                row=f"{self.name}, cp 2",
                ours=speed,
                unit="tokens/s",
                higher_is_better=True,
                peer=one_rank,
                peer_name="one rank, two threads",
                spread=spread,
            ),
            Row(
                row=f"{self.name}, bytes sent",
                ours=max(self.sent_bytes) / MIB,
                unit="MiB",
                higher_is_better=False,
                limit=self.expected_bytes / MIB,
            ),
            Row(
                row=f"{self.name}, communication hidden",
                ours=hidden,
                unit="%",
                higher_is_better=True,
                limit=100.0,
                spread=hidden_spread,
            ),
        ]


def layout_rows(name: str, tokens: int, seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """Return each layout's speed beside one rank's, and tp by rows beside plain tp."""
    speeds = {
        layout: median_and_spread([tokens / one for one in each])
        for layout, each in seconds.items()
    }
    beside = {"tp 2 by rows": "tp 2"}
    return [
        Row(
            row=f"{name}, {layout}",
            ours=ours,
            unit="tokens/s",
            higher_is_better=True,
            peer=speeds[beside.get(layout, "one rank")][0],
            peer_name=beside.get(layout, "one rank, two threads"),
            spread=spread,
        )
        for layout, (ours, spread) in speeds.items()
        if layout != "one rank"
    ]


def variant_rows(
    name: str, kv_s: Mapping[int, Sequence[float]], q_s: Mapping[int, Sequence[float]]
) -> list[Row]:
    """Return pass-KV's time beside pass-Q's, a row for each number of new tokens."""
    rows = []
    for new, seconds in kv_s.items():
        ours, spread = median_and_spread([1e3 * one for one in seconds])
        rows.append(
            Row(
                row=f"{name}, {new:,} new, pass-KV",
                ours=ours,
                unit="ms",
                higher_is_better=False,
                peer=1e3 * median_and_spread(q_s[new])[0],
                peer_name="pass-Q",
                spread=spread,
            )
        )
    return rows


def crossing_row(name: str, measured: float | None, chosen: int | None) -> list[Row]:
    """Return from how many new tokens on pass-KV is no slower; none where it never is."""
    if measured is None:
        return []
    return [
        Row(
            row=f"{name}, pass-KV from",
            ours=measured,
            unit="new tokens",
            higher_is_better=False,
            peer=chosen,
            peer_name="chosen by bytes",
        )
    ]
