"""Owns the second prefill instance that a try asks while the first is late: the wait, and its leg.

It gets no grant here: decode takes from one alone, and the try says from which.
"""

import asyncio
import logging
from collections.abc import Callable

from router.hedging import Hedging
from router.metrics.survival import SurvivalMetrics
from router.prefill_leg import PrefillLeg

_log = logging.getLogger(__name__)


def _no_leg() -> None:
    return None


class Hedge:
    """At most one leg beside another. `open_leg` opens it where there is room this moment."""

    def __init__(
        self, hedging: Hedging, metrics: SurvivalMetrics, open_leg: Callable[[], PrefillLeg | None]
    ) -> None:
        self._hedging = hedging
        self._metrics = metrics
        self._open_leg: Callable[[], PrefillLeg | None] = open_leg
        self._timer: asyncio.TimerHandle | None = None
        self.leg: PrefillLeg | None = None

    def wait(self, tokens: int) -> None:
        """Begins to wait for the first token of a prompt with so many uncached tokens."""
        late_s = self._hedging.began(tokens)
        if late_s is not None:
            self._timer = asyncio.get_running_loop().call_later(late_s, self._begin)

    def _begin(self) -> None:
        if not self._hedging.spend():
            self._metrics.hedged("spent")
            return
        self.leg = self._open_leg()
        if self.leg is None:
            self._metrics.hedged("no room")
        else:
            request_id = f"{self.leg.leg_id:016x}"
            _log.info("a second prefill instance is asked", extra={"request_id": request_id})

    def win(self) -> PrefillLeg | None:
        """Gives up the leg to who goes on with it, if there is one."""
        leg = self._end()
        if leg is not None:
            self._metrics.hedged("won")
        return leg

    def lose(self) -> PrefillLeg | None:
        """Gives up the leg to who closes it, if there is one; none is opened any more."""
        leg = self._end()
        if leg is not None:
            self._metrics.hedged("lost")
        return leg

    def _end(self) -> PrefillLeg | None:
        if self._timer is not None:
            self._timer.cancel()
        self._open_leg = _no_leg  # what it was made for need not wait for the collector
        leg, self.leg = self.leg, None
        return leg
