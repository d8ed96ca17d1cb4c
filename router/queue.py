"""Owns the order in which waiting requests are tried; knows no clock, no instance and no task.

Order: what goes on with a request that has begun, since it holds room that might never come back
or a client sees it pause; then higher priority first; then the tenant that was given least of what
it is entitled to (`fairness`); and of one tenant's requests those overtaken too often, then the
earlier time limit, then arrival.

A request that does not fit now is passed by ones that do, but only `max_bypasses` times by ones
that came later with no higher priority: ones behind it in order, or its own tenant's. After that it
holds back whatever comes behind it. So a large request cannot be starved by an endless row of small
ones: once its tenant's turn has come, it is the tenant's turn until it fits. A tenant that is
overtaken since others are entitled to more gains nothing by that.
"""

import math
import sys
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple, Protocol

from router.fairness import FairShares, Tenants
from router.ledger import CachedTokens, InstanceKey, Need, Placement
from router.views import NothingCached, Size

# Time limits of requests that have left are kept until there are so many.
_MOST_LEFT_LIMITS = 64


_NO_LIMIT: Size = (sys.maxsize, sys.maxsize, sys.maxsize)


def _least_of(one: Size, other: Size) -> Size:
    return (min(one[0], other[0]), min(one[1], other[1]), min(one[2], other[2]))


class Placer(Protocol):
    """What the queue asks about room."""

    def place(self, waiting: "Waiting") -> Placement | None:
        """Where this request fits now."""
        ...

    def fits_ever(self, need: Need) -> bool:
        """Whether it would fit if the instances were empty."""
        ...

    def is_too_small_for(self, size: Size) -> bool:
        """Whether it is known that nothing fits now that needs so much of each, or more."""
        ...


class QueueFull(Exception):
    """The queue holds as many requests as it may."""


class Demand(NamedTuple):
    """The work of requests: places at decode times seconds, tokens of room times seconds, prompts.

    The seconds are those for which they are likely to be held.
    """

    sequence_s: float = 0.0
    token_s: float = 0.0
    prompt_tokens: float = 0.0

    def plus(self, other: "Demand", times: float = 1.0) -> "Demand":
        return Demand(
            self.sequence_s + times * other.sequence_s,
            self.token_s + times * other.token_s,
            self.prompt_tokens + times * other.prompt_tokens,
        )

    def least(self, other: "Demand") -> "Demand":
        """Returns the smaller of each."""
        return Demand(*map(min, self, other))


NOTHING = Demand()


@dataclass(eq=False, kw_only=True)
class Waiting:
    """One request in the queue. `start_by` is when waiting any longer is of no use, in seconds.

    `cached_tokens` says what of its prompt an instance has.
    """

    request_id: int
    need: Need
    priority: int
    start_by: float
    tenant: str = ""
    cached_tokens: CachedTokens = field(default_factory=NothingCached)
    # Instances that failed this request before; taken only where there is no other.
    avoid: frozenset[InstanceKey] = frozenset()
    # Goes on with a request that holds decode's room or whose client has begun to read: ahead of
    # all that wait for such room, and never refused for the queue's length.
    resumes: bool = False
    # Waits to its time limit even while there is no instance that could ever take it.
    patient: bool = False
    # Was let in before: what is asked of new requests only was asked of it then.
    again: bool = False
    # Has not been let in by this router before, even where it `resumes` what another one began: its
    # tenant's caps hold for it.
    is_new_here: bool = False
    # By the gate: the room that it will be booked at decode, in tokens; for how many seconds it is
    # likely to hold it; when it came, and how many seconds it was thought that it would wait.
    room_tokens: int = field(default=0, init=False)
    hold_s: float = field(default=1.0, init=False)
    came_at: float = field(default=0.0, init=False)
    predicted_s: float | None = field(default=None, init=False)
    is_queued: bool = field(default=False, init=False)
    arrival: int = field(default=0, init=False)
    bypasses: int = field(default=0, init=False)
    overdue: bool = field(default=False, init=False)

    def order(self) -> tuple[bool, float, int]:
        """The order among one tenant's requests of one priority."""
        return (not self.overdue, self.start_by, self.arrival)

    @property
    def demand(self) -> Demand:
        if not self.need.decodes:
            return Demand(prompt_tokens=self.need.prompt_tokens)
        return Demand(self.hold_s, self.hold_s * self.room_tokens, self.need.prompt_tokens)


def _resuming_order(waiting: Waiting) -> tuple[int, bool, float, int]:
    return (-waiting.priority, *waiting.order())


class _Lane:
    """One tenant's requests of one priority class, in order, and what they ask for together."""

    def __init__(self) -> None:
        self.entries: list[Waiting] = []
        self.demand = NOTHING

    def add(self, waiting: Waiting) -> None:
        insort(self.entries, waiting, key=Waiting.order)
        self.demand = self.demand.plus(waiting.demand)

    def remove(self, waiting: Waiting) -> None:
        self.entries.remove(waiting)
        self.demand = self.demand.plus(waiting.demand, -1)

    def before(self, waiting: Waiting) -> Demand:
        """Returns what those ask for that a newcomer would come behind."""
        behind = len(self.entries) - bisect_right(self.entries, waiting.order(), key=Waiting.order)
        demand = self.demand
        for later in self.entries[len(self.entries) - behind :]:
            demand = demand.plus(later.demand, -1)
        return demand


class AdmissionQueue:
    """A bounded, ordered queue of requests that wait for room."""

    def __init__(
        self,
        *,
        max_requests: int,
        max_bypasses: int,
        tenants: Tenants | None = None,
        shares: FairShares | None = None,
    ) -> None:
        self._max_requests = max_requests
        self._max_bypasses = max_bypasses
        self._tenants = tenants or Tenants()
        self._shares = shares or FairShares(self._tenants)
        self._resuming: list[Waiting] = []
        # By priority, then by tenant; neither has empty ones.
        self._lanes: dict[int, dict[str, _Lane]] = {}
        self._queued: dict[str, int] = {}
        self._new = 0
        self._arrivals = 0
        # No request needs less of any of these.
        self._least: Size = _NO_LIMIT
        self._left_since = 0
        # Also of requests that have left since; the first one has not.
        self._limits: list[tuple[float, int, Waiting]] = []

    def __len__(self) -> int:
        return len(self._resuming) + self._new

    def __iter__(self) -> Iterator[Waiting]:
        """All requests, in the order in which they are tried."""
        yield from self._resuming
        for priority in sorted(self._lanes, reverse=True):
            lanes = self._lanes[priority]

            def turn(tenant: str, priority: int = priority, lanes: dict[str, _Lane] = lanes) -> Any:
                first = lanes[tenant].entries[0]
                return (self._shares.level(priority, tenant), first.order())

            for tenant in sorted(lanes, key=turn) if len(lanes) > 1 else lanes:
                yield from lanes[tenant].entries

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting.is_queued

    def push(self, waiting: Waiting) -> Waiting | None:
        """Takes a request in; returns the one that has to go for it, if any.

        Where the queue is full, that is the last of the tenant that has most in it for its weight,
        if that is not the newcomer's own and has no higher priority. Raises QueueFull otherwise.
        """
        gives_way = None
        if not waiting.resumes and self._new >= self._max_requests:
            gives_way = self._gives_way(waiting.tenant, waiting.priority)
            if gives_way is None:
                raise QueueFull
            self._remove(gives_way)
        self._arrivals += 1
        waiting.arrival = self._arrivals
        self._add(waiting)
        return gives_way

    def has_place(self, tenant: str, priority: int) -> bool:
        """Whether a new request would be taken in, whatever it asks for."""
        is_full = self._new >= self._max_requests
        return not is_full or self._gives_way(tenant, priority) is not None

    def _gives_way(self, for_tenant: str, for_priority: int) -> Waiting | None:
        def crowd(tenant: str, more: int = 0) -> float:
            return (self._queued.get(tenant, 0) + more) / self._tenants.weight(tenant)

        lanes = [
            (crowd(tenant), -priority, lane)
            for priority, lanes in self._lanes.items()
            if priority <= for_priority
            for tenant, lane in lanes.items()
        ]
        most, _, lane = max(lanes, key=lambda found: found[:2], default=(0.0, 0, _Lane()))
        return lane.entries[-1] if most > crowd(for_tenant, 1) else None

    def discard(self, waiting: Waiting) -> None:
        """Takes a request out; no error where it is not in."""
        if waiting.is_queued:
            self._remove(waiting)

    def _add(self, waiting: Waiting) -> None:
        waiting.is_queued = True
        self._least = _least_of(self._least, waiting.need.size)
        heappush(self._limits, (waiting.start_by, waiting.arrival, waiting))
        if waiting.resumes:
            insort(self._resuming, waiting, key=_resuming_order)
            return
        lanes = self._lanes.setdefault(waiting.priority, {})
        if waiting.tenant not in lanes:
            lanes[waiting.tenant] = _Lane()
            self._shares.join(waiting.priority, waiting.tenant)
        lanes[waiting.tenant].add(waiting)
        self._queued[waiting.tenant] = self._queued.get(waiting.tenant, 0) + 1
        self._new += 1

    def _remove(self, waiting: Waiting) -> None:
        waiting.is_queued = False
        self._leave_order(waiting)
        self._left_since += 1
        if self._left_since > len(self):
            # Those that have left may have needed less than all that are here.
            self._left_since, self._least = 0, _NO_LIMIT
            for left in self:
                self._least = _least_of(self._least, left.need.size)
        while self._limits and not self._limits[0][-1].is_queued:
            heappop(self._limits)
        if len(self._limits) > 2 * len(self) + _MOST_LEFT_LIMITS:
            self._limits = [limit for limit in self._limits if limit[-1].is_queued]
            heapify(self._limits)

    def _leave_order(self, waiting: Waiting) -> None:
        if waiting.resumes:
            self._resuming.remove(waiting)
            return
        lanes = self._lanes[waiting.priority]
        lanes[waiting.tenant].remove(waiting)
        if not lanes[waiting.tenant].entries:
            del lanes[waiting.tenant]
            self._shares.leave(waiting.priority, waiting.tenant)
            if not lanes:
                del self._lanes[waiting.priority]
        self._new -= 1
        self._queued[waiting.tenant] -= 1
        if not self._queued[waiting.tenant]:
            del self._queued[waiting.tenant]

    def next_admissible(self, placer: Placer) -> tuple[Waiting, Placement] | None:
        """Takes out and returns the first request in order that fits and that none holds back."""
        tried: list[Waiting] = []
        for waiting in self:
            placement = placer.place(waiting)
            if placement is not None:
                self._remove(waiting)
                self._count_bypasses(waiting, tried)
                return waiting, placement
            # One that no instance of now can ever hold waits for another instance to come; the
            # room it would need cannot be saved up for it.
            if waiting.overdue and placer.fits_ever(waiting.need):
                return None
            # There may be a thousand more of them.
            if placer.is_too_small_for(self._least):
                return None
            tried.append(waiting)
        return None

    def _count_bypasses(self, admitted: Waiting, tried: list[Waiting]) -> None:
        newly_overdue = []
        for waiting in dict.fromkeys([*tried, *self.of_tenant(admitted.tenant)]):
            if waiting.arrival < admitted.arrival and waiting.priority >= admitted.priority:
                waiting.bypasses += 1
                if waiting.bypasses >= self._max_bypasses and not waiting.overdue:
                    newly_overdue.append(waiting)
        for waiting in newly_overdue:
            self._make_overdue(waiting)

    def _make_overdue(self, waiting: Waiting) -> None:
        entries = self._resuming if waiting.resumes else self._lane(waiting).entries
        order = _resuming_order if waiting.resumes else Waiting.order
        entries.remove(waiting)
        waiting.overdue = True
        insort(entries, waiting, key=order)

    def _lane(self, waiting: Waiting) -> _Lane:
        return self._lanes[waiting.priority][waiting.tenant]

    def before(self, waiting: Waiting) -> Demand:
        """Returns what is asked for by those that a newcomer would come behind.

        Of its own class that is everybody, but no more than what others are entitled to while its
        own tenant's turn comes.
        """
        demand = _sum(w.demand for w in self._resuming)
        for priority, lanes in self._lanes.items():
            if priority > waiting.priority:
                demand = demand.plus(_sum(lane.demand for lane in lanes.values()))
        lanes = self._lanes.get(waiting.priority, {})
        others = [tenant for tenant in lanes if tenant != waiting.tenant]
        own = lanes[waiting.tenant].before(waiting) if waiting.tenant in lanes else NOTHING
        if not others:
            return demand.plus(own)
        everybody = _sum((own, *(lanes[tenant].demand for tenant in others)))
        weight = self._tenants.weight
        rounds = sum(map(weight, others)) / weight(waiting.tenant)
        in_turn = own.plus(own.plus(waiting.demand), rounds)
        return demand.plus(everybody.least(in_turn))

    def of_tenant(self, tenant: str) -> list[Waiting]:
        """Returns the new requests of a tenant that wait."""
        if tenant not in self._queued:
            return []
        lanes = [lanes[tenant] for lanes in self._lanes.values() if tenant in lanes]
        return [waiting for lane in lanes for waiting in lane.entries]

    def take_expired(self, now: float) -> list[Waiting]:
        """Takes out and returns the requests whose time limit has come."""
        expired = []
        while self._limits and self._limits[0][0] <= now:
            *_, waiting = self._limits[0]
            self._remove(waiting)
            expired.append(waiting)
        return expired

    def take(self, condition: Callable[[Waiting], bool]) -> list[Waiting]:
        """Takes out and returns the requests that meet the condition, in order."""
        taken = [w for w in self if condition(w)]
        for waiting in taken:
            self._remove(waiting)
        return taken

    def next_expiry(self) -> float | None:
        return self._limits[0][0] if self._limits else None

    def check_integrity(self) -> None:
        """Raises AssertionError where order, sums or bound are broken; for tests."""
        queued: dict[str, int] = {}
        assert sorted(self._resuming, key=_resuming_order) == self._resuming
        for lanes in self._lanes.values():
            assert lanes
            for tenant, lane in lanes.items():
                assert lane.entries
                assert sorted(lane.entries, key=Waiting.order) == lane.entries
                sums = zip(lane.demand, _sum(w.demand for w in lane.entries), strict=True)
                assert all(math.isclose(kept, own, abs_tol=1e-3) for kept, own in sums)
                queued[tenant] = queued.get(tenant, 0) + len(lane.entries)
        assert queued == self._queued
        limits = [(w.start_by, w.arrival) for *_, w in self._limits if w.is_queued]
        assert sorted(limits) == sorted((w.start_by, w.arrival) for w in self)
        assert self._new == sum(queued.values()) <= self._max_requests


def _sum(demands: Iterable[Demand]) -> Demand:
    total = NOTHING
    for demand in demands:
        total = total.plus(demand)
    return total
