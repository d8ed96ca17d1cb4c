"""When a mock takes its next step. Owns no socket and no clock of its own."""

import asyncio
import random
from collections.abc import Callable
from typing import Protocol


class Pace(Protocol):
    """When one batch is to take its next step."""

    async def next(self) -> None:
        """Return when it is time."""
        ...

    def arrived(self) -> None:
        """Take note that all tokens of a step are at the clients."""
        ...


class Steady:
    """A step in each interval, or as soon as it can be where one is late: none is made up for."""

    def __init__(
        self, interval_s: float, clock: Callable[[], float], *, first_after_s: float = 0.0
    ) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self.due = clock() + first_after_s - interval_s

    async def next(self) -> None:
        """Return when it is time."""
        now = self._clock()
        self.due = max(now, self.due + self._interval_s)
        await asyncio.sleep(self.due - now)

    def arrived(self) -> None:
        """A steady pace waits for nobody."""


class AsTheyArrive:
    """A step as soon as no more than `most` are on their way: as fast as they are passed on."""

    def __init__(self, most: int) -> None:
        self._room = asyncio.Semaphore(most)

    @property
    def is_full(self) -> bool:
        """Whether the next step has to wait."""
        return self._room.locked()

    async def next(self) -> None:
        """Return when it is time."""
        await self._room.acquire()

    def arrived(self) -> None:
        """Take note that all tokens of a step are at the clients."""
        self._room.release()


class Paces:
    """Makes a pace for each batch: of `interval_s`, or as tokens arrive where that is None.

    Instances do not step together: each begins at some point of its first interval, and is up to
    two percent slower or faster than the next.
    """

    def __init__(
        self,
        interval_s: float | None,
        clock: Callable[[], float],
        rng: random.Random,
        most: int = 2,
    ) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._rng = rng
        self._most = most

    def __call__(self) -> Pace:
        if self._interval_s is None:
            return AsTheyArrive(self._most)
        interval_s = self._interval_s * self._rng.uniform(0.98, 1.02)
        return Steady(interval_s, self._clock, first_after_s=self._rng.uniform(0, self._interval_s))
