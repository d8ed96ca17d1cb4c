"""One prefill instance from start to drain: builds the parts and joins them.

Owns the order in which they start and stop. This is the first rank's process; where there are
others, they follow it.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry
from twinpool.v1 import common_pb2, rank_pb2, worker_pb2, worker_pb2_grpc

from engine.blocks import BlockPool
from engine.prefix_cache import PrefixCache
from engine.ring.comm import Traffic
from kvtransfer import AgentStats, SharedRegion, TransferEvent
from prefill.compute import Piece, Steps
from prefill.config import PrefillConfig
from prefill.handoff import Transfers
from prefill.leader import GroupTransfers, peers_message, step_message
from prefill.metrics import LinkMetrics, Metrics
from prefill.rank import Rank, load
from prefill.records import StepReport
from prefill.scheduler import Scheduler
from prefill.server import PrefillService
from prefill.worker import Worker
from service.hung_steps import end_where_a_step_hangs
from service.instance import (
    Incarnation,
    Model,
    Part,
    die,
    make_hello,
    make_identity,
    new_incarnation,
    serve_instance,
)
from service.lifecycle import Server
from service.logs import configure_logging
from service.metrics import new_registry
from service.pool_metrics import PoolMetrics
from service.prefix_journal import PrefixJournal
from service.prefix_keys import PrefixKeys
from service.ranks.group import led, log_name
from service.ranks.leader import Followers
from service.ranks.wire import links_from_wire, sum_of_ranks
from service.routers import Routers
from service.security.settings import Security, instance_security
from service.step_fit import StepFit
from service.wire import counts_to_wire, pairs_to_wire, speed_to_wire

log = logging.getLogger(__name__)


class Instance:
    """The ranks, the engine's thread and the gRPC service, joined."""

    def __init__(
        self,
        settings: PrefillConfig,
        model: Model,
        who: Incarnation,
        registry: CollectorRegistry,
        region: SharedRegion,
        followers: Followers | None,
    ) -> None:
        """`region` is where the model's cache was allocated; `followers` are the other ranks."""
        identity = make_identity(model, who)
        self._rank = Rank(settings, model, identity, region, lambda event: self._on_event(event))
        self._followers = followers
        self._step_timeout_s = settings.step_timeout_s
        transfers = self._transfers(settings.ranks)
        self._steps = Steps(
            self._rank.compute, depth=settings.pp, tell=self._tell_step, on_fatal=die
        )
        pool, tokens = BlockPool(model.num_blocks), model.block_tokens
        # None where there is no prefix cache: routers are then told nothing of one.
        self.journal = PrefixJournal() if settings.prefix_cache else None
        self.prefix_seed = identity.compatibility if settings.prefix_cache else b""
        cache = (
            PrefixCache(
                pool,
                block_size=tokens,
                keys=PrefixKeys(seed=self.prefix_seed),
                on_insert=self.journal.stored,
                on_evict=self.journal.removed,
            )
            if self.journal is not None
            else None
        )
        self._metrics = metrics = Metrics(registry)
        self._step_fit = StepFit(has_base=False)
        self._worker = Worker(
            compute=self._steps,
            block_tokens=tokens,
            pool=pool,
            cache=cache,
            scheduler=Scheduler(
                max_batched_tokens=max(settings.max_batched_tokens * settings.cp, tokens),
                block_size=tokens,
            ),
            transfers=transfers,
            emit=lambda request_id, outcome: self.service.emit(request_id, outcome),
            on_step=self._on_step,
            on_fatal=die,
        )
        self.service = PrefillService(
            name=who.name,
            config=model.config,
            total_blocks=model.num_blocks,
            cp=settings.cp,
            max_queue=settings.max_queue,
            worker=self._worker,
            transfers=transfers,
            peers=self._rank.peers,
            metrics=metrics,
        )
        PoolMetrics("prefill", registry, heartbeat=self.heartbeat, transfer=self._transfer_stats)
        LinkMetrics(registry, self._links)

    def _transfers(self, ranks: int) -> Transfers:
        """Those of this rank alone, or of all as one."""
        self._on_event: Callable[[TransferEvent], None]
        if self._followers is None:
            self._on_event = lambda event: self._worker.transfer_event(event)
            return self._rank.handoff
        transfers = GroupTransfers(
            self._rank.handoff,
            self._rank.agent,
            ranks,
            tell=self._followers.tell,
            emit=lambda end: self._worker.transfer_event(end),
        )
        self._on_event = partial(transfers.take, 0)
        self._followers.on_end = transfers.take
        return transfers

    def _tell_step(self, pieces: Sequence[Piece]) -> None:
        if self._followers is not None:
            self._followers.tell(step_message(pieces))

    def start(self) -> None:
        """Start the threads."""
        self._rank.agent.start()
        self._worker.start()

    async def watch_steps(self) -> None:
        """End the process where a step hangs."""
        await end_where_a_step_hangs(lambda: self._worker.step_under_way, self._step_timeout_s, die)

    def close(self) -> None:
        """Stop the threads."""
        self._worker.stop()
        self._steps.close()
        self._rank.agent.close()

    def update_peers(self, peers: Sequence[worker_pb2.Peer]) -> None:
        """Connect all ranks to the decode instances that the router names."""
        self._rank.peers.update(peers)
        if self._followers is not None:
            self._followers.tell(peers_message(peers))

    def _beats(self) -> dict[int, rank_pb2.RankHeartbeat]:
        return self._followers.beats() if self._followers is not None else {}

    def _transfer_stats(self) -> AgentStats:
        others = (beat.transfer for beat in self._beats().values())
        return sum_of_ranks(self._rank.agent.stats(), others)

    def _links(self) -> dict[int, dict[str, Traffic]]:
        others = {rank: links_from_wire(beat) for rank, beat in self._beats().items()}
        return {0: self._rank.links, **others}

    def _on_step(self, step: StepReport) -> None:
        self._metrics.observe_step(step)
        self._step_fit.observe(step.prompts, step.tokens, step.compute_s)

    def heartbeat(self) -> worker_pb2.Heartbeat:
        """What routers are told again and again."""
        load = self._worker.load()
        pairs = pairs_to_wire(self._rank.agent.stats().peers)
        pairs += [pair for beat in self._beats().values() for pair in beat.pairs]
        return worker_pb2.Heartbeat(
            blocks=counts_to_wire(load.blocks),
            running=load.running,
            waiting=load.waiting,
            draining=self.service.draining,
            pairs=pairs,
            speed=speed_to_wire(self._step_fit.speed),
        )


async def main(settings: PrefillConfig) -> None:
    """Run one prefill instance until it is stopped."""
    who = new_incarnation(settings, "prefill")
    configure_logging(
        role="prefill",
        instance=log_name(settings, who, 0),
        level=settings.log_level,
        as_json=settings.log_json,
    )
    security = instance_security(settings)
    security.warn_if_exposed("prefill instance", settings.host)
    region = SharedRegion()  # so that a decode instance on this host can read the cache itself
    try:
        async with led(settings, who, security) as (followers, part):
            await _serve(settings, who, region, followers, part, security)
    finally:
        region.close()


async def _serve(
    settings: PrefillConfig,
    who: Incarnation,
    region: SharedRegion,
    followers: Followers | None,
    part: Part,
    security: Security,
) -> None:
    model = await asyncio.to_thread(load, settings, part, region)
    registry = new_registry()
    instance = Instance(settings, model, who, registry, region, followers)
    server = Server(
        "prefill",
        host=settings.host,
        port=settings.port,
        reflection=settings.reflection,
        security=security,
    )
    server.add(
        worker_pb2_grpc.add_PrefillServicer_to_server, instance.service, "twinpool.v1.Prefill"
    )
    await server.start()
    instance.start()
    try:
        if followers is not None:
            await followers.wait_ready(model.num_blocks, model.description.fingerprint)
        routers = Routers(
            routers=settings.router,
            hello=make_hello(
                settings,
                model,
                who,
                role=common_pb2.ROLE_PREFILL,
                port=server.port,
                max_sequences=settings.max_queue,
                prefix_seed=instance.prefix_seed,
            ),
            heartbeat=instance.heartbeat,
            assets=lambda: model.assets.files,
            on_peers=instance.update_peers,
            on_drain=lambda _: server.request_stop(),
            prefixes=instance.journal,
            security=security,
        )
        await serve_instance(
            settings,
            server,
            registry,
            routers,
            drain=instance.service.drain,
            background=[instance.watch_steps()],
        )
    finally:
        instance.close()
