"""What the transfer is meant to reach, as ratios within one run, and whether it did. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.movers.figures import Figure, Measured

# Of "raw": (work, carrier) and at least how many times what.
_RAW: dict[tuple[str, str], tuple[str, float]] = {
    ("256 x 64 KiB", "tcp"): ("ucx_perftest", 0.75),
    ("256 x 64 KiB", "shm"): ("ucx_perftest", 0.6),
    ("32 x 4 MiB", "shm"): ("memcpy", 0.9),
    ("2,048 x 8 KiB", "tcp"): ("a message a slice", 2.5),
    ("2,048 x 8 KiB", "shm"): ("a message a slice", 1.4),
}
_AGENT_OF_RAW = 0.8
_RESHARD_TIME = 1.3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One target and what was found: `ratio` is our speed to another's, or our time to its time.

    Attributes:
        bound: What the ratio must reach, or with `of_time` must not exceed.
    """

    row: str
    against: str
    ratio: float
    bound: float
    of_time: bool = False

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.ratio <= self.bound if self.of_time else self.ratio >= self.bound

    @property
    def wanted(self) -> str:
        """The bound in words."""
        return f"time <= {self.bound:.2f}x" if self.of_time else f">= {self.bound:.2f}x"


def verdicts(measured: Sequence[Measured]) -> list[Verdict]:
    """Return every target for which both sides of the ratio were measured."""
    by_name = {(one.work.name, one.carrier.name): one for one in measured}
    found: list[Verdict] = []
    for one in measured:
        found += _of_raw(one)
        found += _of_agent(one)
        found += _of_reshard(one, by_name.get((one.work.same_layout or "", one.carrier.name)))
        found += _of_peer(one)
    return found


def _of_raw(one: Measured) -> Iterator[Verdict]:
    target = _RAW.get((one.work.name, one.carrier.name))
    if target and "raw" in one.ours:
        against, bound = target
        for other in one.every_way:
            if other.name == against:
                yield _verdict(f"{one.name}, raw", one.ours["raw"], against, other, bound)


def _of_agent(one: Measured) -> Iterator[Verdict]:
    if "agent" in one.ours and "raw" in one.ours:
        raw, agent = one.ours["raw"], one.ours["agent"]
        yield _verdict(f"{one.name}, agent", agent, "raw", raw, _AGENT_OF_RAW)


def _of_reshard(one: Measured, same: Measured | None) -> Iterator[Verdict]:
    if same and "agent" in one.ours and "agent" in same.ours:
        yield Verdict(
            row=f"{one.name}, agent",
            against="the same layout",
            ratio=same.ours["agent"].median / one.ours["agent"].median,
            bound=_RESHARD_TIME,
            of_time=True,
        )


def _of_peer(one: Measured) -> Iterator[Verdict]:
    if one.best_peer:
        for mode, ours in one.ours.items():
            yield _verdict(f"{one.name}, {mode}", ours, one.best_peer.name, one.best_peer, 1.0)


def _verdict(row: str, ours: Figure, against: str, other: Figure, bound: float) -> Verdict:
    return Verdict(row=row, against=against, ratio=ours.median / other.median, bound=bound)
