"""Puts the router's parts together and runs them as one process.

What there is for each model, `group` puts together.
"""

import asyncio
import secrets
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge
from twinpool.v1.inference_pb2_grpc import add_InferenceServicer_to_server
from twinpool.v1.worker_pb2_grpc import add_MembershipServicer_to_server

from router.access_log import AccessLog
from router.breaker import BreakerSettings
from router.config import RouterConfig
from router.group import build_group
from router.groups import Groups
from router.inference import InferenceService
from router.membership import Role
from router.metrics.models import NO_MODEL, ModelMetrics
from router.metrics.requests import Outcomes
from router.proof import Proofs
from router.registration import MembershipService
from router.roster import Roster
from service.channels import PUBLIC_MESSAGE_BYTES, dial
from service.garbage import collect_rarely
from service.lifecycle import Server
from service.metrics import MetricsEndpoint, new_registry
from service.security.settings import router_security

_INFERENCE = "twinpool.v1.Inference"


class Router:
    """One router: its parts, its server, its end. Made and used on one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        registry: CollectorRegistry,
        breaker: BreakerSettings | None = None,
    ) -> None:
        self.config = config
        clock = time.monotonic
        security = router_security(config, config.tokens_file)
        security.warn_if_exposed("router", config.host)
        router_id = f"router-{secrets.token_hex(6)}"
        shown = ModelMetrics(registry)
        self.groups = Groups(
            build=partial(
                build_group,
                config=config,
                router_id=router_id,
                dial=partial(dial, security=security),
                clock=clock,
                breaker=breaker,
            ),
            most=config.max_models,
            shown=shown,
            clock=clock,
        )
        self._instances_changed = asyncio.Event()
        self.groups.on_change = self._instances_changed.set
        without_model = CollectorRegistry()
        unplaced = Outcomes(without_model)
        shown.add(NO_MODEL, without_model)
        self._roster = Roster(prefill=config.prefill, decode=config.decode)
        self._access_log = _access_log(config.access_log, registry)
        self._inference = InferenceService(
            version=_version(),
            groups=self.groups,
            unplaced=unplaced,
            caps=config.caps,
            default_timeout_s=config.default_timeout_s,
            clock=clock,
            access_log=self._access_log,
            proofs=Proofs(security.shows),
        )
        self._membership = MembershipService(
            router_id=router_id,
            version=_version(),
            groups=self.groups,
            roster=self._roster,
            unplaced=unplaced,
            heartbeat_interval_s=config.heartbeat_interval_s,
            heartbeats_missed=config.heartbeats_missed,
            clock=clock,
        )
        self.server = Server(
            "router",
            host=config.host,
            port=config.port,
            max_message_bytes=PUBLIC_MESSAGE_BYTES,
            reflection=config.reflection,
            security=security,
        )
        self.server.add(
            add_InferenceServicer_to_server, self._inference, _INFERENCE, serves_at_once=False
        )
        self.server.add(
            add_MembershipServicer_to_server, self._membership, "twinpool.v1.Membership"
        )
        self._watch_missing(registry)

    async def keep_health(self) -> None:
        """Has the health of Inference say whether some model is whole, for ever."""
        while True:
            self._instances_changed.clear()
            is_whole = any(group.is_whole for group in self.groups.all())
            await self.server.set_serving(_INFERENCE, is_whole)
            await self._instances_changed.wait()

    async def drain(self) -> None:
        """Refuses what is new and returns once every open request has ended."""
        await self._inference.drain()
        for group in self.groups.all():
            await group.inflight.settle()

    async def close(self) -> None:
        """Lets go of the instances. To be called when no request is open any more."""
        self._membership.end_all()
        await self.groups.close()
        self._inference.close()
        if self._access_log is not None:
            self._access_log.close()

    def _watch_missing(self, registry: CollectorRegistry) -> None:
        gauge = Gauge(
            "twinpool_router_missing_instances",
            "Instances that the router was given by address and that are not registered.",
            ["role"],
            registry=registry,
        )
        for role in Role:
            gauge.labels(role.value).set_function(partial(self._missing, role))

    def _missing(self, role: Role) -> int:
        instances = [member.instance for member in self.groups.members()]
        return sum(named is role for named, _ in self._roster.missing(instances))


def _access_log(path: str, registry: CollectorRegistry) -> AccessLog | None:
    lost = Counter(
        "twinpool_router_access_log_lost_lines",
        "Lines of the access log that could not be written.",
        registry=registry,
    )
    return AccessLog(path, on_lost=lost.inc) if path else None


async def main(config: RouterConfig) -> None:
    """Runs a router until it is told to stop."""
    registry = new_registry()
    router = Router(config, registry)
    endpoint = MetricsEndpoint(registry, port=config.metrics_port) if config.metrics_port else None
    try:
        await router.server.start()
        collect_rarely()
        await router.server.serve_until_stopped(
            drain=router.drain,
            drain_timeout_s=config.drain_timeout_s,
            background=[router.keep_health()],
        )
    finally:
        await router.close()
        if endpoint is not None:
            endpoint.close()


def _version() -> str:
    try:
        return version("twinpool-server")
    except PackageNotFoundError:
        return "0+unknown"
