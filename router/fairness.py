"""Owns what tenants are entitled to: their shares, their caps; knows no request, room or clock.

A share is one of KV-seconds: tokens of room held, times the seconds they are held. Among those who
wait in one priority class the tenant goes next that was given the least for its weight. This is
deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) with a quantum that goes to nothing: a
round serves whoever it is due to, and no quantum need be larger than the largest request. As in
"Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024, section 4) a tenant that was
idle is lifted to where the others are, so that it gets no credit for the time in which it asked for
nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

# The key, in settings by tenant, for those that are not named.
ANYONE = "*"
# Idle tenants of a class whose debt is remembered, and classes without anybody; oldest go first.
_MAX_IDLE = 1024
_MAX_IDLE_CLASSES = 64

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Tenants:
    """What the operator grants to each tenant, by name or to `ANYONE`; no entry is no cap.

    `max_tokens` bounds the room that a tenant's open requests may come to hold, in tokens.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    max_requests: Mapping[str, int] = field(default_factory=dict)
    max_queued: Mapping[str, int] = field(default_factory=dict)
    max_tokens: Mapping[str, int] = field(default_factory=dict)

    def weight(self, tenant: str) -> float:
        return _granted(self.weights, tenant) or 1.0

    @property
    def have_caps(self) -> bool:
        return bool(self.max_requests or self.max_queued or self.max_tokens)

    def broken_cap(self, tenant: str, usage: "Usage", tokens: int) -> "BrokenCap | None":
        """Returns the cap that one more request of so many tokens would break, if any."""
        caps = (
            ("open requests", self.max_requests, usage.requests, 1),
            ("queued requests", self.max_queued, usage.queued, 1),
            ("tokens of room", self.max_tokens, usage.tokens, tokens),
        )
        for what, limits, used, more in caps:
            limit = _granted(limits, tenant)
            if limit is not None and used + more > limit:
                return BrokenCap(what=what, limit=limit, used=used, needed=more)
        return None


def _granted(by_tenant: Mapping[str, _Number], tenant: str) -> _Number | None:
    return by_tenant.get(tenant, by_tenant.get(ANYONE))


@dataclass(frozen=True, kw_only=True)
class BrokenCap:
    """A cap, what a tenant uses of it, and what it would need on top."""

    what: str
    limit: int
    used: int
    needed: int


@dataclass(kw_only=True)
class Usage:
    """What a tenant's open requests are and may come to hold, in tokens; queued ones are in it."""

    requests: int = 0
    queued: int = 0
    tokens: int = 0


class FairShares:
    """How much each tenant was given in each priority class, for its weight, in KV-seconds."""

    def __init__(self, tenants: Tenants | None = None) -> None:
        self._tenants = tenants or Tenants()
        self._classes: dict[int, _Class] = {}

    def join(self, priority: int, tenant: str) -> None:
        """Note that a tenant has begun to wait in a class."""
        self._classes.setdefault(priority, _Class()).join(tenant)

    def leave(self, priority: int, tenant: str) -> None:
        """Note that none of a tenant's requests waits in a class any more."""
        self._classes[priority].leave(tenant)
        if len(self._classes) > _MAX_IDLE_CLASSES:
            idle = next((p for p, c in self._classes.items() if not c.levels), None)
            if idle is not None:
                del self._classes[idle]

    def level(self, priority: int, tenant: str) -> float:
        """Returns what a tenant that waits was given; who has least goes next."""
        return self._classes[priority].levels[tenant]

    def serve(self, priority: int, tenant: str, kv_seconds: float) -> None:
        """Charge a tenant for a request that is admitted, by what it is expected to take."""
        book = self._classes.setdefault(priority, _Class())
        book.serve(tenant, kv_seconds / self._tenants.weight(tenant))

    def correct(self, priority: int, tenant: str, kv_seconds: float) -> None:
        """Charge what a request has taken more than was expected; less is below 0."""
        if (book := self._classes.get(priority)) is not None:
            book.add(tenant, kv_seconds / self._tenants.weight(tenant))


class _Class:
    """The levels of one priority class."""

    def __init__(self) -> None:
        self.levels: dict[str, float] = {}
        # Idle tenants that were given more than those who stayed: leaving and coming back does
        # not help.
        self._debts: dict[str, float] = {}
        # Where the one stood that was served last, at least; it never falls. Not the least level
        # of all: one whose request does not fit stands still for as long, and whoever came
        # meanwhile would share the credit that is due to it alone.
        self._floor = 0.0

    def join(self, tenant: str) -> None:
        self.levels[tenant] = max(self._floor, self._debts.pop(tenant, 0.0))

    def leave(self, tenant: str) -> None:
        self._owe(tenant, self.levels.pop(tenant))

    def _owe(self, tenant: str, level: float) -> None:
        self._debts[tenant] = level
        if len(self._debts) > _MAX_IDLE:
            self._debts = {t: debt for t, debt in self._debts.items() if debt > self._floor}
        if len(self._debts) > _MAX_IDLE:
            del self._debts[next(iter(self._debts))]

    def serve(self, tenant: str, amount: float) -> None:
        book = self.levels if tenant in self.levels else self._debts
        self._floor = max(self._floor, book.get(tenant, 0.0))
        self.add(tenant, amount)

    def add(self, tenant: str, amount: float) -> None:
        if tenant in self.levels:
            self.levels[tenant] += amount
        else:
            self._owe(tenant, self._debts.get(tenant, self._floor) + amount)
