"""Counts what collectives do: calls and bytes, by kind. Owns the counts, sends nothing itself.

Bytes are those of the tensors that a rank hands over for the others: of an all-to-all without its
own part. Calls of `Collectives` with nothing in them do nothing, and are not counted. What they
take of a step is told its watch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from engine.parallel import Collectives, ExpertGroup
from engine.step_watch import COLLECTIVES, StepWatch


@dataclass
class Count:
    """Calls, and the bytes that this rank handed over in them."""

    calls: int = 0
    bytes: int = 0


@dataclass
class Tally:
    """Counts by the name of the collective, and the watch whose time they take."""

    kinds: dict[str, Count] = field(default_factory=dict)
    watch: StepWatch = field(default_factory=StepWatch, compare=False, repr=False)

    def add(self, kind: str, size: int) -> None:
        """Count a call with so many bytes."""
        count = self.kinds.setdefault(kind, Count())
        count.calls += 1
        count.bytes += size

    def timed(self, call: Callable[[], Tensor]) -> Tensor:
        """Return what a collective gives, whose time is not that of the part that wants it."""
        before = self.watch.to(COLLECTIVES)
        found = call()
        self.watch.to(before)
        return found

    def so_far(self) -> Mapping[str, Count]:
        """Return a copy of the counts; from any thread."""
        return {kind: Count(count.calls, count.bytes) for kind, count in dict(self.kinds).items()}

    def take(self) -> dict[str, Count]:
        """Return the counts and begin anew."""
        found, self.kinds = self.kinds, {}
        return found


class CountedCollectives:
    """See parallel.Collectives; what `ranks` does is counted in `tally`."""

    def __init__(self, ranks: Collectives, tally: Tally) -> None:
        self._ranks = ranks
        self._tally = tally

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Collectives."""
        self._count("all_reduce", x)
        return self._tally.timed(lambda: self._ranks.all_reduce(x))

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        """See Collectives."""
        if len(x):
            self._tally.add("all_gather", x.nbytes)
        return self._tally.timed(lambda: self._ranks.all_gather(x, width))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See Collectives."""
        self._count("reduce_scatter", x)
        return self._tally.timed(lambda: self._ranks.reduce_scatter(x))

    def all_gather_rows(self, x: Tensor, rows: int) -> Tensor:
        """See Collectives."""
        if rows:
            self._tally.add("all_gather_rows", x.nbytes)
        return self._tally.timed(lambda: self._ranks.all_gather_rows(x, rows))

    def _count(self, kind: str, x: Tensor) -> None:
        if x.numel():
            self._tally.add(kind, x.nbytes)


class CountedExperts:
    """See parallel.ExpertGroup; what `group` does is counted in `tally`."""

    def __init__(self, group: ExpertGroup, tally: Tally) -> None:
        self.size = group.size
        self.rank = group.rank
        self._group = group
        self._tally = tally

    def all_to_all(
        self, x: Tensor, give: Sequence[int] | None = None, take: Sequence[int] | None = None
    ) -> Tensor:
        """See ExpertGroup."""
        own = len(x) // self.size if give is None else give[self.rank]
        row = x.element_size() * (x[0].numel() if len(x) else 0)
        self._tally.add("all_to_all", (len(x) - own) * row)
        return self._tally.timed(lambda: self._group.all_to_all(x, give, take))

    def all_gather(self, x: Tensor) -> Tensor:
        """See ExpertGroup."""
        self._tally.add("expert_all_gather", x.nbytes)
        return self._tally.timed(lambda: self._group.all_gather(x))

    def all_reduce(self, x: Tensor) -> Tensor:
        """See ExpertGroup."""
        self._tally.add("expert_all_reduce", x.nbytes)
        return self._tally.timed(lambda: self._group.all_reduce(x))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See ExpertGroup."""
        self._tally.add("expert_reduce_scatter", x.nbytes - x.nbytes // self.size)
        return self._tally.timed(lambda: self._group.reduce_scatter(x))
