"""Metrics that both pools have: cache blocks by state, requests, and the KV transfer's counters.

Owns their names. Values are read when somebody scrapes, so nothing here costs a step anything.
"""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from twinpool.v1 import worker_pb2

from kvtransfer import AgentStats

_BLOCK_STATES = ("free", "reserved", "used", "cached", "quarantined")
_TRANSFER_COUNTERS = {
    "bytes": "KV bytes moved.",
    "messages": "Data messages moved.",
    "completed": "Transfers that were completed.",
    "failed": "Transfers that failed.",
    "late_pieces": "Pieces that came after their transfer's end.",
    "stale_pieces": "Pieces of an earlier epoch.",
    "refused_pieces": "Pieces that no grant allowed.",
    "refused_hellos": "Connections refused.",
    "lost_connections": "Connections lost.",
    "stalls": "Times in which pieces were ready and none could leave.",
    "hidden_bytes": "KV bytes that left before the last layer was computed.",
}
_TRANSFER_SECONDS = {
    "seconds": "Seconds that completed transfers took.",
    "pack_s": "Seconds of copying KV into buffers.",
    "checksum_s": "Seconds of making and verifying checksums.",
    "wire_s": "Seconds from the start of pieces to their end, summed over pieces.",
    "scatter_s": "Seconds of copying KV into the cache.",
    "stalled_s": "Seconds in which pieces were ready and none could leave.",
    "detection_s": "Seconds from a lost peer's last word to the loss, summed over losses.",
}


class PoolMetrics(Collector):
    """Reads one instance's state at each scrape.

    Args:
        heartbeat: The state that routers are told as well.
        transfer: The transfer agent's counters.
    """

    def __init__(
        self,
        role: str,
        registry: CollectorRegistry,
        *,
        heartbeat: Callable[[], worker_pb2.Heartbeat],
        transfer: Callable[[], AgentStats],
    ) -> None:
        self._prefix = f"twinpool_{role}"
        self._heartbeat = heartbeat
        self._transfer = transfer
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The families of this instance."""
        beat = self._heartbeat()
        blocks = GaugeMetricFamily(
            f"{self._prefix}_kv_blocks", "KV cache blocks by state.", labels=["state"]
        )
        for state in _BLOCK_STATES:
            blocks.add_metric([state], getattr(beat.blocks, state))
        yield blocks
        for name in ("running", "waiting"):
            text = f"Requests {name}."
            yield GaugeMetricFamily(f"{self._prefix}_requests_{name}", text, getattr(beat, name))
        yield from self._transfer_families(self._transfer())

    def _transfer_families(self, stats: AgentStats) -> Iterable[Metric]:
        prefix = f"{self._prefix}_kv_transfer"
        for name, text in _TRANSFER_COUNTERS.items():
            yield CounterMetricFamily(f"{prefix}_{name}", text, getattr(stats, name))
        yield GaugeMetricFamily(f"{prefix}_active", "Transfers under way.", stats.active_transfers)
        slots = GaugeMetricFamily(f"{prefix}_slots", "Staging slots by state.", labels=["state"])
        for state, count in stats.slots.items():
            slots.add_metric([state], count)
        yield slots
        for field, text in _TRANSFER_SECONDS.items():
            name = "seconds" if field == "seconds" else field.removesuffix("_s") + "_seconds"
            yield CounterMetricFamily(f"{prefix}_{name}", text, getattr(stats, field))
        text = "Longest seconds from a lost peer's last word to the loss."
        yield GaugeMetricFamily(
            f"{prefix}_slowest_detection_seconds", text, stats.slowest_detection_s
        )
        yield from self._peer_families(f"{prefix}_peer", stats)

    def _peer_families(self, prefix: str, stats: AgentStats) -> Iterable[Metric]:
        labels = ["instance", "rank", "transport"]
        counters = {
            "bytes": "KV bytes moved on an open connection.",
            "messages": "Data messages moved on an open connection.",
            "seconds": "Seconds in which an open connection's transfers ran.",
        }
        for name, text in counters.items():
            family = CounterMetricFamily(f"{prefix}_{name}", text, labels=labels)
            for peer in stats.peers:
                family.add_metric(
                    [peer.instance, str(peer.rank), peer.transport], getattr(peer, name)
                )
            yield family
        gauges = {
            "rtt_s": ("rtt_seconds", "Round trip of a word when the connection was made."),
            "probe_bytes_per_s": (
                "probe_bytes_per_second",
                "Bandwidth found when the connection was made.",
            ),
        }
        for field, (name, text) in gauges.items():
            gauge = GaugeMetricFamily(f"{prefix}_{name}", text, labels=labels)
            for peer in stats.peers:
                value = getattr(peer, field)
                if value is not None:
                    gauge.add_metric([peer.instance, str(peer.rank), peer.transport], value)
            yield gauge
