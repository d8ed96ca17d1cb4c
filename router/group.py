"""Puts together what serves one model: ledger, queue, pools, the requests in flight, their metrics.

Nothing in a group knows that there may be others; which there are, `groups` knows.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from router.admission import Admission
from router.breaker import Breakers, BreakerSettings, State
from router.config import RouterConfig
from router.credit_uses import CreditUses
from router.gate import Gate
from router.hedging import Hedging
from router.inflight import Inflight
from router.ledger import InstanceKey, Ledger
from router.local_prefill import LocalPrefill
from router.membership import Model
from router.metrics import Metrics
from router.output_lengths import OutputLengths
from router.policies import POLICIES
from router.pools import Pools
from router.workers import Dial


@dataclass(frozen=True, kw_only=True)
class ModelGroup:
    """What serves one model; open from the first instance's registration on."""

    name: str
    registry: CollectorRegistry
    metrics: Metrics
    ledger: Ledger
    admission: Admission
    pools: Pools
    inflight: Inflight
    uses: CreditUses

    @property
    def model(self) -> Model:
        """The model as its instances describe it."""
        model = self.pools.members.model
        assert model is not None, "a group is open before it has an instance"
        return model

    @property
    def has_instances(self) -> bool:
        return len(self.pools.members) > 0

    @property
    def is_whole(self) -> bool:
        """Whether instances of both roles are connected and stay."""
        return min(self.ledger.largest_prompt_tokens(), self.ledger.largest_request_tokens()) > 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing in it: no instance, no request."""
        return not self.has_instances and not self.metrics.requests.open_requests

    async def close(self) -> None:
        """Lets go of the instances. To be called when no request is open any more."""
        await self.inflight.settle()
        await self.pools.close()
        self.end()

    def end(self) -> None:
        """Stops the clocks of a group that has nothing in it."""
        self.uses.close()
        self.admission.close()


def build_group(
    name: str,
    *,
    config: RouterConfig,
    router_id: str,
    dial: Dial,
    clock: Callable[[], float],
    breaker: BreakerSettings | None = None,
) -> ModelGroup:
    """Makes a group without instances; on the event loop that is to run it."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    ledger = Ledger(max_prefill_requests=config.max_prefill_requests)
    admission = Admission(gate=_gate(config, ledger), metrics=metrics.admission, clock=clock)
    breakers = Breakers[InstanceKey](
        breaker or BreakerSettings(share=config.breaker_share), random.Random()
    )
    pools = Pools(
        router_id=router_id,
        ledger=ledger,
        admission=admission,
        clock=clock,
        dial=dial,
        breakers=breakers,
        on_breaker=metrics.survival.breaker,
    )
    inflight = Inflight(
        pools=pools,
        admission=admission,
        metrics=metrics,
        max_queue_wait_s=config.max_queue_wait_s,
        max_retries=config.max_retries,
        clock=clock,
        # Ids must not be guessed by one client of another.
        rng=random.SystemRandom(),
        hedging=Hedging(config.hedge_prefill),
    )
    _watch_requests(metrics, admission)
    _watch_room(metrics, ledger, breakers)
    metrics.watch(
        "overcommit_risk",
        "Highest of all decode instances' probabilities of lacking blocks for what they have.",
        lambda: max(admission.overcommit_risks().values(), default=0.0),
    )
    return ModelGroup(
        name=name,
        registry=registry,
        metrics=metrics,
        ledger=ledger,
        admission=admission,
        pools=pools,
        inflight=inflight,
        uses=CreditUses(ledger=ledger, admission=admission),
    )


def _gate(config: RouterConfig, ledger: Ledger) -> Gate:
    return Gate(
        ledger=ledger,
        policy=POLICIES[config.policy](),
        tenants=config.tenants,
        max_queue=config.max_queue,
        max_bypasses=config.max_bypasses,
        grace_s=config.restart_grace_s,
        refuses_early=config.refuse_early,
        local=LocalPrefill(config.local_prefill_max),
        lengths=OutputLengths(config.reserve_quantile if config.reserve == "expected" else None),
    )


def _watch_requests(metrics: Metrics, admission: Admission) -> None:
    metrics.watch("queue_depth", "Requests that wait for room.", lambda: admission.queued)
    metrics.watch("open_requests", "Requests open.", lambda: metrics.requests.open_requests)
    metrics.watch(
        "num_requests_running",
        "Requests that have room in the pools.",
        lambda: metrics.requests.open_requests - admission.queued,
        prefix="twinpool",
    )
    metrics.watch(
        "num_requests_waiting",
        "Requests that wait for room.",
        lambda: admission.queued,
        prefix="twinpool",
    )


def _watch_room(metrics: Metrics, ledger: Ledger, breakers: Breakers[InstanceKey]) -> None:
    metrics.watch(
        "breakers_open",
        "Instances that get nothing, or one request, since too many failed there.",
        lambda: breakers.count(State.OPEN) + breakers.count(State.HALF_OPEN),
    )
    metrics.watch_states(
        "ledger_blocks",
        "KV blocks of the decode pool by what the ledger knows of them.",
        {
            "free": lambda: ledger.amounts().free_blocks,
            "held": lambda: (found := ledger.amounts()).blocks - found.free_blocks,
        },
    )
    metrics.watch(
        "ledger_free_blocks",
        "KV blocks of the decode pool that no request holds.",
        lambda: ledger.amounts().free_blocks,
    )
    metrics.watch(
        "ledger_total_blocks",
        "KV blocks of the decode pool.",
        lambda: ledger.amounts().blocks,
    )
    metrics.watch(
        "prefill_outstanding_tokens",
        "Prompt tokens given to prefill and not done.",
        lambda: ledger.amounts().owed_tokens,
    )
