"""Trying out a new connection: how long a word takes there and back, and how fast its lane is.

Owns the steps of one probe. Its payload is no part of any transfer and is thrown away.
"""

import logging
import statistics
from collections.abc import Iterable

from kvtransfer import wire
from kvtransfer.api import PeerProbed
from kvtransfer.send_lanes import MappedSend, SendLane
from kvtransfer.transport import Link

logger = logging.getLogger(__name__)

_LATENCY, _BANDWIDTH = 1, 2
# A pair counts as far below its like at this share of their median, when so many are known.
_FAR_BELOW, _FEW_PAIRS = 0.25, 2


class Probe:
    """One connection's probe; goes on whenever its lane can send. With 0 bytes only latency."""

    def __init__(self, link: Link, lane: SendLane, welcome: wire.Welcome, size: int) -> None:
        self._link = link
        self._lane = lane
        self._mapped = isinstance(lane, MappedSend)
        self._size = size
        self._piece_bytes = welcome.slot_bytes
        self._left = 0 if self._mapped else size
        self._asked = 0
        self._asked_at = 0.0
        self.over = False
        self.note = welcome.note
        self.rtt_s: float | None = None
        self.bytes_per_s: float | None = None

    def go_on(self, now: float) -> bool:
        """Do what can be done now; True once, when the probe is over."""
        if not self._asked:
            self._ask(_LATENCY, 0, now)
        elif self.rtt_s is not None and self.bytes_per_s is None and self._size:
            if self._asked == _LATENCY:
                self._asked, self._asked_at = _BANDWIDTH, now
            self._fill()
        self.over = self.rtt_s is not None and (self.bytes_per_s is not None or not self._size)
        return self.over

    def _fill(self) -> None:
        """Send probe pieces, and after the last one ask whether all are there."""
        if self._left < 0:
            return
        while self._left and self._lane.can_send:
            size = min(self._left, self._piece_bytes)
            self._lane.probe(size)
            self._left -= size
        if not self._left:
            self._left = -1
            self._link.send_control(wire.encode(wire.Ping(_BANDWIDTH, self._size)))

    def _ask(self, number: int, probe_bytes: int, now: float) -> None:
        self._asked, self._asked_at = number, now
        self._link.send_control(wire.encode(wire.Ping(number, probe_bytes)))

    def answered(self, number: int, micros: int, now: float) -> None:
        """The receiver has answered; on a mapped lane it alone knows how long reading took."""
        if number != self._asked:
            return
        took_s = max(now - self._asked_at, 1e-9)
        if number == _LATENCY and self.rtt_s is None:
            self.rtt_s = took_s
        elif number == _BANDWIDTH:
            if self._mapped:
                took_s = max(micros, 1) / 1e6
            self.bytes_per_s = self._size / took_s

    def report(self, instance: str, rank: int, carrier: str) -> PeerProbed:
        """Log what was found of the connection to a rank; return the event that says it."""
        if self.note:
            logger.warning("%s rank %d: %s", instance, rank, self.note)
        speed = f"{self.bytes_per_s / 1e9:.2f} GB/s" if self.bytes_per_s else "speed not probed"
        rtt_s = self.rtt_s or 0.0
        text = "KV to %s rank %d: %s, %.2f ms there and back, %s"
        logger.info(text, instance, rank, carrier, 1e3 * rtt_s, speed)
        return PeerProbed(instance, rank, carrier, rtt_s, self.bytes_per_s, self.note)


def lagging(bytes_per_s: float | None, others: Iterable[float | None]) -> str:
    """Return what to say of a pair that is far slower than its like, "" where it is not."""
    known = [rate for rate in others if rate is not None]
    if bytes_per_s is None or len(known) < _FEW_PAIRS:
        return ""
    usual = statistics.median(known)
    if bytes_per_s > usual * _FAR_BELOW:
        return ""
    return f"{bytes_per_s / 1e9:.2f} GB/s where its peers have {usual / 1e9:.2f}"
