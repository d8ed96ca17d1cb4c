"""A loopback network on which everything that goes to one plug can come late.

Owns when things arrive, also in receives whose link is closed. Changes and loses nothing.
"""

import math
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from kvtransfer.loopback import Lane as Way
from kvtransfer.loopback import LoopbackLink, LoopbackTransport, Network


class LateTransport(LoopbackTransport):
    """A receiver's plug: receives of a closed link stay where late messages find them."""

    linger = False

    def withdraw(self, link: LoopbackLink) -> list[Any]:
        """Leave the receives posted, as hardware does that may still write."""
        return [] if self.linger else super().withdraw(link)

    def let_go(self) -> None:
        """Make what lingers terminal."""
        with self.network.lock:
            self.linger = False
            for link in self._links:
                if link.closed:
                    self.network.cancel(self.withdraw(link))

    def land_everything(self) -> None:
        """Let all that is under way arrive now."""
        with self.network.lock:
            self._run_late(math.inf)

    @property
    def awaits(self) -> bool:
        """Whether something is still under way."""
        with self.network.lock:
            return bool(self._late)


class LateNetwork(Network):
    """What goes to `slow` takes up to `most_s` longer; only streams and control keep their order.

    A stream arrives in parts, so that a transfer can end in the midst of a piece. Messages take
    `outlive_s` more, which lets them outlive their link.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self.most_s = self.outlive_s = 0.0
        self.slow: LateTransport | None = None
        self._due: dict[Way, float] = {"control": 0.0, "stream": 0.0}

    def late_transport(self) -> LateTransport:
        """Return the plug of the receiver."""
        with self.lock:
            self.slow = LateTransport(self, b"slow")
            self._addresses[self.slow.data_address] = self.slow
            return self.slow

    def deliver(
        self,
        lane: Way,
        message: bytes,
        target: LoopbackTransport,
        arrive: Callable[[bytes], None],
    ) -> None:
        """See Network."""
        if target is not self.slow:
            target.arrive_at(0.0, partial(arrive, message))
            return
        for part in self._parts(message) if lane == "stream" else (message,):
            due = time.monotonic() + self._rng.random() * self.most_s
            if lane == "data":
                due += self.outlive_s
            else:
                due = self._due[lane] = max(due, self._due[lane])
            target.arrive_at(due, partial(arrive, part))

    def _parts(self, message: bytes) -> list[bytes]:
        cuts = sorted(self._rng.randrange(len(message)) for _ in range(self._rng.randrange(3)))
        ends = zip((0, *cuts), (*cuts, len(message)), strict=True)
        return [message[begin:end] for begin, end in ends if end > begin]

    def delay_control(self, seconds: float) -> None:
        """Let no control message arrive before so many seconds have passed."""
        with self.lock:
            self._due["control"] = time.monotonic() + seconds

    @property
    def holds(self) -> bool:
        """Whether something waits for its stream to be released."""
        with self.lock:
            return any(stream._out for stream in self.streams)

    def cut(self) -> None:
        """Break every link, at both ends at once."""
        assert self.slow is not None
        with self.lock:
            for far in list(self.slow._links):
                near = far.far
                if near is not None:
                    near.break_off("cut")
                    far.break_off("cut")
