"""How values are spread, in little memory however many there are. Pure."""

import math
from collections import Counter
from itertools import accumulate

# Buckets are this much apart, as a logarithm: what is read from them is right to half a percent.
_STEP = 0.01
_SMALLEST_S = 1e-6


class Spread:
    """Counts times in buckets of one percent; times below a microsecond count as one."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def __len__(self) -> int:
        return self._counts.total()

    def add(self, seconds: float, times: int = 1) -> None:
        """Take in a value that came `times` times."""
        self._counts[math.floor(math.log(max(seconds, _SMALLEST_S)) / _STEP)] += times

    def merge(self, other: "Spread") -> None:
        """Take in all that another one has."""
        self._counts.update(other._counts)

    def percentile(self, percent: float) -> float:
        """Return the seconds that `percent` of the values are at or below.

        Raises ValueError where there are none.
        """
        if not self._counts:
            raise ValueError("no value has been taken in")
        wanted = percent / 100 * len(self)
        buckets = sorted(self._counts)
        seen = accumulate(self._counts[bucket] for bucket in buckets)
        reached = next(bucket for bucket, upto in zip(buckets, seen, strict=True) if upto >= wanted)
        return math.exp((reached + 0.5) * _STEP)
