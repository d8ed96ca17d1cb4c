"""Finds the highest rate that attains enough, by bisection with confidence. Pure.

A rate is run again until the interval in which its attainment lies (Wilson's, for a share of
independent requests) is on one side of what is wanted, or all its runs are spent; it then goes by
the attainment itself, and is said to be unsure. Requests that come in one burst fare alike, so
intervals are somewhat narrower than they ought to be.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist


def wilson(met: int, submitted: int, confidence: float) -> tuple[float, float]:
    """Return between which shares the true one is (E. B. Wilson, 1927); at least one submitted."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = met / submitted, z * z / submitted
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # At the ends it is exact but for the rounding.
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a search is after, and how hard it tries.

    Attributes:
        attainment: Part of the submitted requests that are to keep their limits.
        confidence: Of the interval that an attainment is said to lie in.
        runs: Of one rate, at most.
        precision: The search ends when the rate is known to this part of it.
    """

    attainment: float = 0.9
    confidence: float = 0.95
    runs: int = 3
    precision: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is known of one rate, over all of its runs."""

    rate: float
    met: int
    submitted: int
    runs: int
    wanted: Wanted

    @property
    def attainment(self) -> float:
        """The part of the submitted requests that kept their limits."""
        return self.met / self.submitted

    @property
    def interval(self) -> tuple[float, float]:
        """Between which the true attainment is."""
        return wilson(self.met, self.submitted, self.wanted.confidence)

    @property
    def is_sure(self) -> bool:
        """Whether all of the interval is on one side."""
        low, high = self.interval
        return low >= self.wanted.attainment or high < self.wanted.attainment

    @property
    def is_settled(self) -> bool:
        """Whether it is not to be run again."""
        return self.is_sure or self.runs >= self.wanted.runs

    @property
    def passes(self) -> bool:
        """Whether enough is attained, as far as is known."""
        return self.attainment >= self.wanted.attainment

    def plus(self, met: int, submitted: int) -> "Point":
        """Return what is known after one more run."""
        return Point(
            rate=self.rate,
            met=self.met + met,
            submitted=self.submitted + submitted,
            runs=self.runs + 1,
            wanted=self.wanted,
        )

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.rate:g} requests/s: {100 * self.attainment:.1f}% of {self.submitted} attained"
            f" ({100 * low:.1f} to {100 * high:.1f}%), {'enough' if self.passes else 'too few'}"
            f"{'' if self.is_sure else ', unsure'}"
        )


class Search:
    """Which rate is to be run next, between `lowest` and `highest`, beginning with `start`.

    Doubles or halves the rate until it is between one that attains enough and one that does not,
    then goes to their geometric mean.
    """

    def __init__(self, wanted: Wanted, *, start: float, lowest: float, highest: float) -> None:
        self._wanted = wanted
        self._start, self._lowest, self._highest = start, lowest, highest
        self._points: dict[float, Point] = {}

    @property
    def points(self) -> list[Point]:
        """All that was run, by rate."""
        return [self._points[rate] for rate in sorted(self._points)]

    @property
    def best(self) -> Point | None:
        """The highest rate that attained enough, below all that did not."""
        failed = self.lowest_failed
        passed = [p for p in self.points if p.passes and (failed is None or p.rate < failed)]
        return passed[-1] if passed else None

    @property
    def lowest_failed(self) -> float | None:
        """The lowest rate that did not attain enough."""
        return next((point.rate for point in self.points if not point.passes), None)

    def next(self) -> float | None:
        """Return the rate of the next run; None when the search is over."""
        for point in self._points.values():
            if not point.is_settled:
                return point.rate
        best, failed = self.best, self.lowest_failed
        if best is None:
            return self._lower(failed)
        if failed is None:
            return None if best.rate >= self._highest else min(2 * best.rate, self._highest)
        if failed / best.rate <= 1 + self._wanted.precision:
            return None
        middle = _rounded(math.sqrt(best.rate * failed))
        return middle if best.rate < middle < failed else None

    def add(self, rate: float, met: int, submitted: int) -> Point:
        """Take in a run and return what is now known of its rate."""
        before = self._points.get(rate) or Point(
            rate=rate, met=0, submitted=0, runs=0, wanted=self._wanted
        )
        self._points[rate] = before.plus(met, submitted)
        return self._points[rate]

    def _lower(self, failed: float | None) -> float | None:
        if failed is None:
            return self._start
        return None if failed <= self._lowest else max(_rounded(failed / 2), self._lowest)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
