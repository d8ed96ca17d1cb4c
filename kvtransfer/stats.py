"""Counters of an agent.

Owned and changed by the agent's thread alone; others see frozen AgentStats.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from kvtransfer.api import AgentStats, PeerStats


@dataclass(slots=True)
class Counters:
    """What has happened since start."""

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
    slowest_detection_s: float = 0.0

    def lost(self, silence_s: float) -> None:
        """Count a connection lost this long after its peer was last heard."""
        self.lost_connections += 1
        self.slowest_detection_s = max(self.slowest_detection_s, silence_s)

    def snapshot(
        self, active_transfers: int, slots: dict[str, int], peers: Iterable[PeerStats]
    ) -> AgentStats:
        """Return the counters with what is held right now."""
        per_peer = tuple(peers)
        return AgentStats(
            **asdict(self),
            active_transfers=active_transfers,
            connections=len(per_peer),
            slots=slots,
            peers=per_peer,
        )
