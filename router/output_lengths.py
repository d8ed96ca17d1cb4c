"""Owns what is known of how long answers get, by tenant; pure, no clock.

Finished answers are counted in buckets of their length, each about a tenth wider than the one
before; all counts are halved now and then, so that what is long ago matters less and memory is
bounded. An answer that its `max_new_tokens` has cut off says only that it would have been longer.
So the part of answers that get longer than a bucket is the product of the parts that did not end in
it and those below, each of the answers that came so far (Kaplan and Meier, "Nonparametric
Estimation from Incomplete Observations", 1958). Beyond what answers were seen to end at, nothing is
said.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from router.views import Need

# The longest answers of each bucket; what is longer still counts to the last one.
_EDGES = tuple(sorted({round(2 ** (eighth / 8)) for eighth in range(8 * 20 + 1)}))
# At so many answers all counts are halved.
_MEMORY = 512
# So many of the answers that a quantile is taken of are likely to be above it.
_LEAST_ABOVE = 2
# Tenants whose answers are remembered; the one that was first seen is forgotten first.
_MAX_TENANTS = 1024


class Moments(NamedTuple):
    """The mean of a number of tokens, and of its square."""

    mean: float
    square: float

    @property
    def variance(self) -> float:
        return max(0.0, self.square - self.mean**2)


class Curve:
    """What part of answers gets longer than so many tokens, at the edge of each bucket."""

    def __init__(self, ended: Iterable[float], cut: Iterable[float]) -> None:
        counts = list(zip(ended, cut, strict=True))
        reached = sum(ends + cuts for ends, cuts in counts)
        # From the first token on, which all reach.
        self._reached, self._longer = [reached], [1.0]
        for ends, cuts in counts:
            part = 1 - ends / reached if reached > 0 else 1.0
            self._longer.append(self._longer[-1] * max(0.0, part))
            reached = max(0.0, reached - ends - cuts)
            self._reached.append(reached)

    def reached(self, tokens: int) -> float:
        """How many answers were seen to get longer than that."""
        return self._reached[bisect_right(_EDGES, tokens)]

    def longer(self, tokens: int) -> float:
        """What part of answers gets longer."""
        return self._longer[bisect_right(_EDGES, tokens)]

    def quantile(self, part: float, after: int) -> int | None:
        """Tokens that this part of the answers longer than `after` keeps to; None: not known."""
        least = self.longer(after) * (1 - part)
        for index in range(bisect_right(_EDGES, after), len(_EDGES)):
            if self._longer[index + 1] <= least:
                return _EDGES[index]
        return None

    def moments(self, after: int, most: int) -> Moments:
        """Those of the tokens of an answer that is longer than `after` and is cut off at `most`."""
        longer = self.longer(after)
        if longer <= 0 or after >= most:
            return Moments(most, most**2)
        mean, square = (
            (sums(most) - sums(after)) / longer for sums in (self._sum_to, self._square_to)
        )
        return Moments(after + mean, after**2 + square)

    @cached_property
    def _sums(self) -> list[tuple[float, float]]:
        """At each edge: the sum of `longer` over the tokens up to there; and of 2t times it."""
        starts = (0, *_EDGES)
        parts = (
            (longer * (end - start), longer * (end**2 - start**2))
            for start, end, longer in zip(starts, _EDGES, self._longer, strict=False)
        )
        return list(accumulate(parts, lambda a, b: (a[0] + b[0], a[1] + b[1]), initial=(0.0, 0.0)))

    def _sum_to(self, tokens: int) -> float:
        index, start = _edge_below(tokens)
        return self._sums[index][0] + self._longer[index] * (tokens - start)

    def _square_to(self, tokens: int) -> float:
        index, start = _edge_below(tokens)
        return self._sums[index][1] + self._longer[index] * (tokens**2 - start**2)


def _edge_below(tokens: int) -> tuple[int, int]:
    index = bisect_right(_EDGES, tokens)
    return index, _EDGES[index - 1] if index else 0


class Lengths:
    """The lengths of finished answers of one kind. Other threads may ask for the curve."""

    def __init__(self) -> None:
        self._ended = [0.0] * len(_EDGES)
        self._cut = [0.0] * len(_EDGES)
        self._count = 0.0
        self._curve: Curve | None = None

    def add(self, tokens: int, *, is_cut: bool) -> None:
        """Takes note of an answer; `is_cut`: it would have been longer."""
        counts = self._cut if is_cut else self._ended
        counts[min(bisect_left(_EDGES, tokens), len(_EDGES) - 1)] += 1
        self._count += 1
        if self._count >= _MEMORY:
            self._ended, self._cut = ([c / 2 for c in each] for each in (self._ended, self._cut))
            self._count /= 2
        self._curve = None

    @property
    def curve(self) -> Curve:
        curve = self._curve
        if curve is None:
            curve = self._curve = Curve(self._ended, self._cut)
        return curve


class OutputLengths:
    """The answers of all tenants, and how long another one is expected to get.

    Args:
        quantile: The part of answers that are to keep to what is expected; None: nothing is.
    """

    def __init__(self, quantile: float | None = None) -> None:
        self._quantile = quantile
        self._of_all = Lengths()
        self._of_tenant: dict[str, Lengths] = {}

    @property
    def is_on(self) -> bool:
        return self._quantile is not None

    def finished(self, tenant: str, tokens: int, *, is_cut: bool) -> None:
        """Takes note of a whole answer; `is_cut`: its max_new_tokens, or the like, ended it."""
        of_tenant = self._of_tenant.setdefault(tenant, Lengths())
        if len(self._of_tenant) > _MAX_TENANTS:
            del self._of_tenant[next(iter(self._of_tenant))]
        for lengths in (self._of_all, of_tenant):
            lengths.add(tokens, is_cut=is_cut)

    def expect(self, tenant: str, need: Need) -> Need:
        """Returns the need with the output that is expected; all there may be if too few ended."""
        if self._quantile is None or not need.decodes:
            return need
        whole = self._whole(tenant, need, self._quantile)
        new = need.max_new_tokens
        if whole is not None:
            new = min(new, whole - need.generated_tokens)
        return replace(need, expected_new_tokens=new)

    def _whole(self, tenant: str, need: Need, quantile: float) -> int | None:
        """Tokens of the whole answer, with what of it was generated before."""
        after = need.generated_tokens + need.sure_new_tokens
        for curve in self._curves(tenant):
            if curve.reached(after) * (1 - quantile) >= _LEAST_ABOVE - 1e-6:
                return curve.quantile(quantile, after)
        return None

    def final_tokens(self, tenant: str, need: Need, generated: int) -> Moments:
        """Those of the whole answer to a request of which so many tokens are there."""
        most = need.generated_tokens + need.max_new_tokens
        after = max(generated, need.generated_tokens + need.sure_new_tokens)
        for curve in self._curves(tenant):
            if curve.reached(after) >= _LEAST_ABOVE:
                return curve.moments(after, most)
        return Moments(most, most**2)

    def _curves(self, tenant: str) -> Iterable[Curve]:
        of_tenant = self._of_tenant.get(tenant)
        if of_tenant is not None:
            yield of_tenant.curve
        yield self._of_all.curve
