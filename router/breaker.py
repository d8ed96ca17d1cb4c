"""Owns the verdict on instances by how their requests end; pure: time and chance are handed in.

An instance of which too many of the last requests failed is opened: it gets nothing for a pause.
Then one request tries it, and closes it again where that goes well; each time that it does not, the
next pause is longer. The last instance of a role that can be used is never opened: requests that
may fail are better than none.
"""

import random
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)


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


@dataclass
class _Breaker:
    state: State = State.CLOSED
    # Moments of the last ends, and whether they were failures.
    ends: deque[tuple[float, bool]] = field(default_factory=deque)
    openings: int = 0


class Breakers(Generic[_Key]):
    """The breakers of all instances; those that nothing is known of are closed."""

    def __init__(self, settings: BreakerSettings, rng: random.Random) -> None:
        self._settings = settings
        self._rng = rng
        self._breakers: dict[_Key, _Breaker] = {}

    def state(self, key: _Key) -> State:
        breaker = self._breakers.get(key)
        return breaker.state if breaker is not None else State.CLOSED

    def count(self, state: State) -> int:
        """Returns how many instances are in a state, of those that any request ended at."""
        return sum(breaker.state is state for breaker in self._breakers.values())

    def failed(self, key: _Key, now: float, *, has_others: Callable[[], bool]) -> float | None:
        """Takes note of a failure. Returns the pause in seconds where that opens the instance.

        `has_others` says whether its role has another instance to use.
        """
        breaker = self._breakers.setdefault(key, _Breaker())
        self._note(breaker, now, True)
        if breaker.state is State.OPEN:
            return None
        if breaker.state is State.CLOSED and not self._fails_too_often(breaker):
            return None
        if not has_others():
            return None
        breaker.state = State.OPEN
        return self._pause_s(breaker)

    def succeeded(self, key: _Key, now: float) -> bool:
        """Takes note of a request that went well; returns whether that closes the instance."""
        breaker = self._breakers.setdefault(key, _Breaker())
        self._note(breaker, now, False)
        if breaker.state is not State.HALF_OPEN:
            return False
        self._breakers[key] = _Breaker()
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

    def _note(self, breaker: _Breaker, now: float, is_failure: bool) -> None:
        breaker.ends.append((now, is_failure))
        while (
            len(breaker.ends) > self._settings.last
            or breaker.ends[0][0] < now - self._settings.window_s
        ):
            breaker.ends.popleft()

    def _fails_too_often(self, breaker: _Breaker) -> bool:
        failures = sum(is_failure for _, is_failure in breaker.ends)
        return (
            self._settings.share > 0
            and len(breaker.ends) >= self._settings.least
            and failures >= self._settings.share * len(breaker.ends)
        )

    def _pause_s(self, breaker: _Breaker) -> float:
        pause_s = min(
            self._settings.longest_pause_s, self._settings.pause_s * 2.0**breaker.openings
        )
        breaker.openings = min(breaker.openings + 1, 32)
        return pause_s * (1 + self._settings.jitter * self._rng.random())
