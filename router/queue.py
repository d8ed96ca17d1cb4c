"""Owns the order in which waiting requests are tried; knows no clock, no instance and no task.

Order: what goes on with a request that has begun, since it holds room that might never come back
or a client sees it pause; then higher priority first, then overtaken too often, then the earlier
time limit, then arrival. A request that does not fit now is passed by ones that do, but only
`max_bypasses` times by ones that came later with no higher priority; after that it holds back
whatever comes behind it. So a large request cannot be starved by an endless row of small ones.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from router.ledger import CachedTokens, InstanceKey, Need, Placement


class Placer(Protocol):
    """What the queue asks about room."""

    def place(self, waiting: "Waiting") -> Placement | None:
        """Where this request fits now."""
        ...

    def fits_ever(self, need: Need) -> bool:
        """Whether it would fit if the instances were empty."""
        ...


class QueueFull(Exception):
    """The queue holds as many requests as it may."""


@dataclass(eq=False, kw_only=True)
class Waiting:
    """One request in the queue. `start_by` is when waiting any longer is of no use, in seconds.

    `cached_tokens` says what of its prompt an instance has.
    """

    request_id: int
    need: Need
    priority: int
    start_by: float
    cached_tokens: CachedTokens = lambda key, dp_rank=0: 0
    # Instances that failed this request before; taken only where there is no other.
    avoid: frozenset[InstanceKey] = frozenset()
    # Goes on with a request that holds decode's room or whose client has begun to read: ahead of
    # all that wait for such room, and never refused for the queue's length.
    resumes: bool = False
    # Waits to its time limit even while there is no instance that could ever take it.
    patient: bool = False
    arrival: int = field(default=0, init=False)
    bypasses: int = field(default=0, init=False)
    overdue: bool = field(default=False, init=False)

    def order(self) -> tuple[bool, int, bool, float, int]:
        rank = (not self.overdue, self.start_by, self.arrival)
        return (not self.resumes, -self.priority, *rank)


class AdmissionQueue:
    """A bounded, ordered queue of requests that wait for room."""

    def __init__(self, *, max_requests: int, max_bypasses: int) -> None:
        self._max_requests = max_requests
        self._max_bypasses = max_bypasses
        self._entries: list[Waiting] = []
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting in self._entries

    def push(self, waiting: Waiting) -> None:
        """Raises QueueFull."""
        if not waiting.resumes and self._new() >= self._max_requests:
            raise QueueFull
        self._arrivals += 1
        waiting.arrival = self._arrivals
        insort(self._entries, waiting, key=Waiting.order)

    def discard(self, waiting: Waiting) -> None:
        """Takes a request out; no error where it is not in."""
        if waiting in self._entries:
            self._entries.remove(waiting)

    def next_admissible(self, placer: Placer) -> tuple[Waiting, Placement] | None:
        """Takes out and returns the first request in order that fits and that none holds back."""
        for waiting in self._entries:
            placement = placer.place(waiting)
            if placement is not None:
                self._entries.remove(waiting)
                self._count_bypasses(waiting)
                return waiting, placement
            # One that no instance of now can ever hold waits for another instance to come; the
            # room it would need cannot be saved up for it.
            if waiting.overdue and placer.fits_ever(waiting.need):
                return None
        return None

    def _count_bypasses(self, admitted: Waiting) -> None:
        newly_overdue = []
        for waiting in self._entries:
            if waiting.arrival < admitted.arrival and waiting.priority >= admitted.priority:
                waiting.bypasses += 1
                if waiting.bypasses >= self._max_bypasses and not waiting.overdue:
                    newly_overdue.append(waiting)
        for waiting in newly_overdue:
            self._entries.remove(waiting)
            waiting.overdue = True
            insort(self._entries, waiting, key=Waiting.order)

    def take_expired(self, now: float) -> list[Waiting]:
        """Takes out and returns the requests whose time limit has come."""
        return self.take(lambda waiting: waiting.start_by <= now)

    def take(self, condition: Callable[[Waiting], bool]) -> list[Waiting]:
        """Takes out and returns the requests that meet the condition, in order."""
        taken = [w for w in self._entries if condition(w)]
        self._entries = [w for w in self._entries if not condition(w)]
        return taken

    def next_expiry(self) -> float | None:
        return min((w.start_by for w in self._entries), default=None)

    def _new(self) -> int:
        return sum(not waiting.resumes for waiting in self._entries)

    def check_integrity(self) -> None:
        """Raises AssertionError where order or bound are broken; for tests and idle checks."""
        orders = [w.order() for w in self._entries]
        assert orders == sorted(orders)
        assert self._new() <= self._max_requests
