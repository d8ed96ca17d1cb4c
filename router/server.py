"""Puts the router's parts together and runs them as one process."""

import random
import secrets
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry
from twinpool.v1 import worker_pb2
from twinpool.v1.inference_pb2_grpc import add_InferenceServicer_to_server
from twinpool.v1.worker_pb2_grpc import add_MembershipServicer_to_server

from router.access_log import AccessLog
from router.admission import Admission
from router.breaker import Breakers, BreakerSettings, State
from router.config import RouterConfig
from router.credit_uses import CreditUses
from router.gate import Gate
from router.hedging import Hedging
from router.inference import InferenceService
from router.inflight import Inflight
from router.ledger import InstanceKey, Ledger
from router.local_prefill import LocalPrefill
from router.metrics import Metrics
from router.output_lengths import OutputLengths
from router.policies import POLICIES
from router.pools import Pools
from router.proof import Proofs
from router.registration import MembershipService
from service.channels import PUBLIC_MESSAGE_BYTES, dial
from service.garbage import collect_rarely
from service.lifecycle import Server
from service.metrics import MetricsEndpoint, new_registry
from service.security.settings import router_security


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
        self.ledger = Ledger(max_prefill_requests=config.max_prefill_requests)
        self.metrics = Metrics(registry)
        gate = Gate(
            ledger=self.ledger,
            policy=POLICIES[config.policy](),
            tenants=config.tenants,
            max_queue=config.max_queue,
            max_bypasses=config.max_bypasses,
            grace_s=config.restart_grace_s,
            refuses_early=config.refuse_early,
            local=LocalPrefill(config.local_prefill_max),
            lengths=OutputLengths(
                config.reserve_quantile if config.reserve == "expected" else None
            ),
        )
        self.admission = Admission(gate=gate, metrics=self.metrics, clock=clock)
        breakers = Breakers[InstanceKey](
            breaker or BreakerSettings(share=config.breaker_share), random.Random()
        )
        self.metrics.watch(
            "breakers_open",
            "Instances that get nothing, or one request, since too many failed there.",
            lambda: breakers.count(State.OPEN) + breakers.count(State.HALF_OPEN),
        )
        self.pools = Pools(
            router_id=router_id,
            ledger=self.ledger,
            admission=self.admission,
            clock=clock,
            dial=partial(dial, security=security),
            breakers=breakers,
            on_breaker=self.metrics.breaker,
        )
        self.inflight = Inflight(
            pools=self.pools,
            admission=self.admission,
            metrics=self.metrics,
            max_queue_wait_s=config.max_queue_wait_s,
            max_retries=config.max_retries,
            clock=clock,
            # Ids must not be guessed by one client of another.
            rng=random.SystemRandom(),
            hedging=Hedging(config.hedge_prefill),
        )
        self._access_log = (
            AccessLog(config.access_log, on_lost=self.metrics.lost_line)
            if config.access_log
            else None
        )
        self._inference = InferenceService(
            version=_version(),
            pools=self.pools,
            ledger=self.ledger,
            inflight=self.inflight,
            metrics=self.metrics,
            caps=config.caps,
            default_timeout_s=config.default_timeout_s,
            clock=clock,
            access_log=self._access_log,
            proofs=Proofs(security.shows),
        )
        self._uses = CreditUses(ledger=self.ledger, admission=self.admission)
        self._membership = MembershipService(
            router_id=router_id,
            version=_version(),
            pools=self.pools,
            ledger=self.ledger,
            uses=self._uses,
            heartbeat_interval_s=config.heartbeat_interval_s,
            heartbeats_missed=config.heartbeats_missed,
            clock=clock,
            request_counts=self._request_counts,
            risks=self.admission.overcommit_risks,
        )
        self.server = Server(
            "router",
            host=config.host,
            port=config.port,
            max_message_bytes=PUBLIC_MESSAGE_BYTES,
            reflection=config.reflection,
            security=security,
        )
        self.server.add(add_InferenceServicer_to_server, self._inference, "twinpool.v1.Inference")
        self.server.add(
            add_MembershipServicer_to_server, self._membership, "twinpool.v1.Membership"
        )
        self._watch_levels()

    async def drain(self) -> None:
        """Refuses what is new and returns once every open request has ended."""
        await self._inference.drain()
        await self.inflight.settle()

    async def close(self) -> None:
        """Lets go of the instances. To be called when no request is open any more."""
        self._membership.end_all()
        await self.inflight.settle()
        await self.pools.close()
        self._uses.close()
        self.admission.close()
        self._inference.close()
        if self._access_log is not None:
            self._access_log.close()

    def _request_counts(self) -> worker_pb2.RequestCounts:
        outcomes = self.metrics.outcomes
        queued = self.admission.queued
        return worker_pb2.RequestCounts(
            queued=queued,
            running=self._inference.open_requests - queued,
            finished=outcomes["finished"],
            refused=outcomes["refused"],
            aborted=outcomes["aborted"],
            failed=outcomes["failed"],
            retried=self.metrics.retries,
            overcommitted=self.metrics.overcommitted_count,
            outgrown=self.metrics.outgrown_count,
        )

    def _watch_levels(self) -> None:
        ledger, admission, inference = self.ledger, self.admission, self._inference
        self.metrics.watch("queue_depth", "Requests that wait for room.", lambda: admission.queued)
        self.metrics.watch("open_requests", "Requests open.", lambda: inference.open_requests)
        self.metrics.watch(
            "num_requests_running",
            "Requests that have room in the pools.",
            lambda: inference.open_requests - admission.queued,
            prefix="twinpool",
        )
        self.metrics.watch(
            "num_requests_waiting",
            "Requests that wait for room.",
            lambda: admission.queued,
            prefix="twinpool",
        )
        self.metrics.watch_states(
            "ledger_blocks",
            "KV blocks of the decode pool by what the ledger knows of them.",
            {
                "free": lambda: sum(d.free_blocks for d in ledger.decodes()),
                "held": lambda: sum(d.capacity.dp_blocks - d.free_blocks for d in ledger.decodes()),
            },
        )
        self.metrics.watch(
            "overcommit_risk",
            "Highest of all decode instances' probabilities of lacking blocks for what they have.",
            lambda: max(admission.overcommit_risks().values(), default=0.0),
        )
        self.metrics.watch(
            "ledger_free_blocks",
            "KV blocks of the decode pool that no request holds.",
            lambda: sum(d.free_blocks for d in ledger.decodes()),
        )
        self.metrics.watch(
            "ledger_total_blocks",
            "KV blocks of the decode pool.",
            lambda: sum(d.capacity.dp_blocks for d in ledger.decodes()),
        )
        self.metrics.watch(
            "prefill_outstanding_tokens",
            "Prompt tokens given to prefill and not done.",
            lambda: sum(p.outstanding_tokens for p in ledger.prefills()),
        )


async def main(config: RouterConfig) -> None:
    """Runs a router until it is told to stop."""
    registry = new_registry()
    router = Router(config, registry)
    endpoint = MetricsEndpoint(registry, port=config.metrics_port) if config.metrics_port else None
    try:
        await router.server.start()
        collect_rarely()
        await router.server.serve_until_stopped(
            drain=router.drain, drain_timeout_s=config.drain_timeout_s
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
