"""Finds the highest rate for several limits at once: a run of one counts for all. Pure."""

from collections.abc import Mapping, Sequence

from bench.goodputs.records import Record
from bench.goodputs.search import Search
from bench.goodputs.slo import Slo


class JointSearch:
    """A search for each of some limits; they take turns in saying which rate is run next."""

    def __init__(self, searches: Mapping[Slo, Search]) -> None:
        self._searches = dict(searches)
        self._asked = dict.fromkeys(self._searches, 0)

    @property
    def of_limits(self) -> Mapping[Slo, Search]:
        """The searches, with all that is known."""
        return self._searches

    def next(self) -> float | None:
        """Return the rate of the next run; None when all searches are over."""
        for slo in sorted(self._searches, key=self._asked.__getitem__):
            rate = self._searches[slo].next()
            if rate is not None:
                self._asked[slo] += 1
                return rate
        return None

    def add(self, rate: float, records: Sequence[Record]) -> None:
        """Take in a run by the records of its window."""
        for slo, search in self._searches.items():
            search.add(rate, sum(map(slo.met_by, records)), len(records))
