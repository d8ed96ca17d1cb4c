"""Counters of an agent.

Owned and changed by the agent's thread alone; others see frozen AgentStats.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

from kvtransfer.api import AgentStats, PeerStats

Phase = Literal["pack_s", "checksum_s", "wire_s", "scatter_s"]


@dataclass(slots=True)
class Counters:
    """What has happened since start; bytes and messages are those of connections that ended."""

    bytes: int = 0
    messages: int = 0
    seconds: float = 0.0
    completed: int = 0
    failed: int = 0
    late_pieces: int = 0
    stale_pieces: int = 0
    refused_pieces: int = 0
    refused_hellos: int = 0
    lost_connections: int = 0
    detection_s: float = 0.0
    slowest_detection_s: float = 0.0
    pack_s: float = 0.0
    checksum_s: float = 0.0
    wire_s: float = 0.0
    scatter_s: float = 0.0
    stalls: int = 0
    stalled_s: float = 0.0
    hidden_bytes: int = 0

    def lost(self, silence_s: float) -> None:
        """Count a connection lost this long after its peer was last heard."""
        self.lost_connections += 1
        self.detection_s += silence_s
        self.slowest_detection_s = max(self.slowest_detection_s, silence_s)

    @contextmanager
    def spent(self, phase: Phase) -> Iterator[None]:
        """Add the time within to what a phase has taken."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - began)

    def add(self, phase: Phase, seconds: float) -> None:
        """Add to what a phase has taken."""
        setattr(self, phase, getattr(self, phase) + seconds)

    def snapshot(
        self, active_transfers: int, slots: dict[str, int], peers: Iterable[PeerStats]
    ) -> AgentStats:
        """Return the counters with what is held right now."""
        per_peer = tuple(peers)
        ended = asdict(self)
        return AgentStats(
            bytes=ended.pop("bytes") + sum(peer.bytes for peer in per_peer),
            messages=ended.pop("messages") + sum(peer.messages for peer in per_peer),
            **ended,
            active_transfers=active_transfers,
            connections=len(per_peer),
            slots=slots,
            peers=per_peer,
        )
