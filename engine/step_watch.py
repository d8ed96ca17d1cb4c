"""How a step's time is spent, by part. Owns the sums; the step's own thread drives it.

At every moment of a step exactly one part runs, so that the parts add up to the step. On a device
that computes by itself these are the host's times.
"""

import time
from collections.abc import Callable, Mapping

ATTENTION, DENSE, EXPERTS, HEAD = "attention", "mlp", "experts", "head"
COLLECTIVES, SAMPLING, REBALANCE, REST = "collectives", "sampling", "rebalance", "rest"
PARTS = (ATTENTION, DENSE, EXPERTS, HEAD, COLLECTIVES, SAMPLING, REBALANCE, REST)


class StepWatch:
    """Seconds by part of all steps so far. Nothing is counted outside of a step.

    Norms and additions belong to the part that they come before; collectives to none other.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part: str | None = None
        self._since_s = 0.0

    @property
    def seconds(self) -> Mapping[str, float]:
        """The sums; from any thread, a step under way is counted up to its latest change."""
        return dict(self._seconds)

    def begin(self) -> None:
        """A step begins, if it has not already, with what belongs to no other part."""
        if self._part is not None:
            return
        self._part = REST
        self._since_s = self._clock()

    def to(self, part: str | None) -> str | None:
        """Go over to another part; return the one before, to go back to. None outside of steps."""
        before = self._part
        if before is None:
            return None
        self._charge(before)
        self._part = part
        return before

    def move(self, seconds: Mapping[str, float]) -> None:
        """Give other parts some of what the one that runs has taken since it began."""
        before = self._part
        if before is None:
            return
        self._charge(before)
        for part, spent_s in seconds.items():
            self._seconds[part] += spent_s
            self._seconds[before] -= spent_s

    def end(self) -> None:
        """The step is over."""
        self.to(None)

    def _charge(self, part: str) -> None:
        now = self._clock()
        self._seconds[part] += now - self._since_s
        self._since_s = now
