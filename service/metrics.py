"""What every role's metrics share: the registry, histogram buckets, the endpoint on loopback.

The metrics themselves belong to the roles, which make them in the registry they are given.
"""

import threading
from types import TracebackType
from typing import Self
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from service.errors import StartError

# Bounds in seconds, chosen so that dashboards made for vLLM's metrics read these as well.
# fmt: off
TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
TPOT_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)
REQUEST_BUCKETS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)
QUEUE_BUCKETS_S = REQUEST_BUCKETS_S
HANDOFF_BUCKETS_S = TTFT_BUCKETS_S
# fmt: on


def new_registry() -> CollectorRegistry:
    """Returns a registry of this process's own, with its CPU, memory and descriptors in it."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


class MetricsEndpoint:
    """Serves a registry as text over HTTP, on loopback unless told otherwise."""

    def __init__(self, registry: CollectorRegistry, *, port: int, host: str = "127.0.0.1") -> None:
        try:
            server, thread = start_http_server(port, addr=host, registry=registry)
        except OSError as exc:
            raise StartError(
                f"metrics port {port} on {host} is in use: choose another with --metrics-port"
            ) from exc
        self._server: WSGIServer = server
        self._thread: threading.Thread = thread
        self.port: int = server.server_port

    def close(self) -> None:
        """Stops answering and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
