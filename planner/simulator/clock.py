"""Owns virtual time, and what is to happen when; knows nothing of what that is."""

import heapq
import itertools
from collections.abc import Callable

Happens = Callable[[], None]


class Clock:
    """Time stands still while something happens, then jumps to the next thing.

    What is to happen at one moment happens in the order in which it was asked for, so that the same
    questions give the same answers.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Happens]] = []

    def at(self, moment: float, happens: Happens) -> None:
        """Let something happen; what is late already happens next."""
        heapq.heappush(self._events, (max(moment, self.now), next(self._order), happens))

    def after(self, seconds: float, happens: Happens) -> None:
        """Let something happen so much later."""
        self.at(self.now + seconds, happens)

    def run(self) -> None:
        """Let things happen until nothing is left to."""
        while self._events:
            self.now, _, happens = heapq.heappop(self._events)
            happens()
