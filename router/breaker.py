"""Owns the verdict on instances by how their requests end; pure: time and chance are handed in.

An instance of which too many of the last requests failed is opened: it gets nothing for a pause.
Then one request tries it, and closes it again where that goes well; each time that it does not, the
next pause is longer. The last instance of a role that can be used is never opened: requests that
may fail are better than none.

A lost transfer is a failure of two instances, of which mostly one is to blame. It counts against
the one whose transfers with others fail more often, if that is half of them at least; against
neither as long as nothing tells them apart.
"""

import random
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

_Key = TypeVar("_Key", bound=Hashable)

# Of the transfers with others, the part that has to be lost for a lost one to be one's own fault.
_TO_BLAME = 0.5


class State(Enum):
    """Of one instance: it gets work, gets none, or gets one request."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, kw_only=True)
class BreakerSettings:
    """When an instance is opened, and for how long.

    Attributes:
        share: Of the last requests, the part whose failure opens; 0 switches breakers off.
        least: Fewer requests than that say nothing.
        last: How many of the last requests count at most.
        window_s: How long they count.
        pause_s: The first pause; each is twice the one before it, up to `longest_pause_s`.
        jitter: By what part a pause may be longer, so that not all instances come back at once.
    """

    share: float = 0.5
    least: int = 4
    last: int = 16
    window_s: float = 30.0
    pause_s: float = 1.0
    longest_pause_s: float = 60.0
    jitter: float = 0.25


class _End(NamedTuple, Generic[_Key]):
    """How a request ended at an instance, or a transfer with a `partner`."""

    moment: float
    is_failure: bool
    partner: _Key | None = None


@dataclass
class _Breaker(Generic[_Key]):
    state: State = State.CLOSED
    # The last requests; those whose transfer was lost name the partner.
    ends: deque[_End[_Key]] = field(default_factory=deque)
    transfers: deque[_End[_Key]] = field(default_factory=deque)
    openings: int = 0


class Breakers(Generic[_Key]):
    """The breakers of all instances; those that nothing is known of are closed."""

    def __init__(self, settings: BreakerSettings, rng: random.Random) -> None:
        self._settings = settings
        self._rng = rng
        self._breakers: dict[_Key, _Breaker[_Key]] = {}

    def state(self, key: _Key) -> State:
        breaker = self._breakers.get(key)
        return breaker.state if breaker is not None else State.CLOSED

    def count(self, state: State) -> int:
        """Returns how many instances are in a state, of those that any request ended at."""
        return sum(breaker.state is state for breaker in self._breakers.values())

    def transferred(self, source: _Key, target: _Key, now: float, *, is_failure: bool) -> None:
        """Takes note of a transfer between two instances; it says nothing of a whole request."""
        for key, partner in ((source, target), (target, source)):
            self._note(self._of(key).transfers, _End(now, is_failure, partner))

    def failed(
        self,
        key: _Key,
        now: float,
        *,
        has_others: Callable[[], bool],
        partner: _Key | None = None,
    ) -> float | None:
        """Takes note of a failure. Returns the pause in seconds where that opens the instance.

        `has_others` says whether its role has another instance to use. Where the failure is a lost
        transfer, which `transferred` knows of already, `partner` was at its other end.
        """
        breaker = self._of(key)
        self._note(breaker.ends, _End(now, True, partner))
        if breaker.state is State.OPEN:
            return None
        if breaker.state is State.CLOSED and not self._fails_too_often(key, now):
            return None
        if partner is not None and self._is_to_blame(partner, key, now):
            return None
        if not has_others():
            return None
        breaker.state = State.OPEN
        return self._pause_s(breaker)

    def succeeded(self, key: _Key, now: float) -> bool:
        """Takes note of a request that went well; returns whether that closes the instance."""
        breaker = self._of(key)
        self._note(breaker.ends, _End(now, False))
        if breaker.state is not State.HALF_OPEN:
            return False
        self._breakers[key] = _Breaker(transfers=breaker.transfers)
        return True

    def half_open(self, key: _Key) -> bool:
        """Ends a pause; returns whether there was one to end. One request is then to be let in."""
        breaker = self._breakers.get(key)
        if breaker is None or breaker.state is not State.OPEN:
            return False
        breaker.state = State.HALF_OPEN
        return True

    def close(self, key: _Key) -> bool:
        """Closes an instance whatever it did, as where no other is left; whether it was not."""
        return self.state(key) is not State.CLOSED and bool(self._breakers.pop(key))

    def forget(self, key: _Key) -> None:
        """The instance has gone."""
        self._breakers.pop(key, None)

    def _of(self, key: _Key) -> _Breaker[_Key]:
        return self._breakers.setdefault(key, _Breaker())

    def _note(self, ends: deque[_End[_Key]], end: _End[_Key]) -> None:
        ends.append(end)
        while (
            len(ends) > self._settings.last or ends[0].moment < end.moment - self._settings.window_s
        ):
            ends.popleft()

    def _fails_too_often(self, key: _Key, now: float) -> bool:
        """What was lost with others to blame says nothing of this one."""
        counted = [
            end.is_failure
            for end in self._of(key).ends
            if end.partner is None or self._is_to_blame(key, end.partner, now)
        ]
        return (
            self._settings.share > 0
            and len(counted) >= self._settings.least
            and sum(counted) >= self._settings.share * len(counted)
        )

    def _is_to_blame(self, key: _Key, partner: _Key, now: float) -> bool:
        """Whether transfers that are lost between two are this one's fault, and not the other's."""
        share = self._lost_with_others(key, partner, now)
        return share >= _TO_BLAME and share > self._lost_with_others(partner, key, now)

    def _lost_with_others(self, key: _Key, partner: _Key, now: float) -> float:
        """What part of an instance's transfers with all but one partner is lost.

        As if there had been one more of either kind, so that where nothing is known it is a half.
        """
        since = now - self._settings.window_s
        lost = [
            end.is_failure
            for end in self._of(key).transfers
            if end.partner != partner and end.moment >= since
        ]
        return (sum(lost) + 1) / (len(lost) + 2)

    def _pause_s(self, breaker: _Breaker[_Key]) -> float:
        pause_s = min(
            self._settings.longest_pause_s, self._settings.pause_s * 2.0**breaker.openings
        )
        breaker.openings = min(breaker.openings + 1, 32)
        return pause_s * (1 + self._settings.jitter * self._rng.random())
