"""Owns when a second prefill instance is asked for the same prompt; pure, no clock.

How long prefill takes is learned from first tokens; one that is `factor` times as late as that is
hedged. No more than a small part of all requests is, so that a pool that is slow as a whole is not
asked for everything twice.
"""

from collections import deque
from statistics import median

# Fewer first tokens than that say nothing, and so many are remembered.
_LEAST_FIRSTS = 8
_MOST_FIRSTS = 128
# What is late by less than that is not worth a second computation.
_LEAST_S = 0.05
# Of all requests, so many may be hedged, and at most that many in a row.
_SHARE = 0.05
_MOST_AT_ONCE = 8.0


class Hedging:
    """What is known of first tokens, and how many hedges may still be made.

    `factor` 0 switches hedging off.
    """

    def __init__(self, factor: float = 0.0) -> None:
        self._factor = factor
        self._firsts: deque[tuple[float, float]] = deque(maxlen=_MOST_FIRSTS)
        self._budget = 1.0

    def began(self, tokens: int) -> float | None:
        """Counts a request; returns the seconds after which it is late, None if nobody can say.

        `tokens` of its prompt are not known to be cached.
        """
        self._budget = min(_MOST_AT_ONCE, self._budget + _SHARE)
        if not self._factor or len(self._firsts) < _LEAST_FIRSTS:
            return None
        # A short prompt waits for others all the same, and a long one computes longer than most.
        usual_s = median(seconds for seconds, _ in self._firsts)
        token_s = median(per_token for _, per_token in self._firsts)
        return max(_LEAST_S, self._factor * max(usual_s, tokens * token_s))

    def first_came(self, tokens: int, seconds: float) -> None:
        """Takes note of how long a first token took, of so many that were not cached."""
        if self._factor:
            self._firsts.append((seconds, seconds / max(1, tokens)))

    def spend(self) -> bool:
        """Returns whether there may be one more hedge, and counts it."""
        if self._budget < 1:
            return False
        self._budget -= 1
        return True
