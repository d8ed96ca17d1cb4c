"""Metrics that both pools have: cache blocks by state, requests, and the KV transfer's counters.

Owns their names. Values are read when somebody scrapes, so nothing here costs a step anything.
"""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from twinpool.v1 import worker_pb2

from kvtransfer import AgentStats

_BLOCK_STATES = ("free", "reserved", "used", "quarantined")
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
