"""One decode instance from start to drain: builds the parts and joins them.

Owns the order in which they start and stop. This is the first rank's process; where there are
others, they follow it.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry
from twinpool.v1 import common_pb2, rank_pb2, worker_pb2, worker_pb2_grpc

from decode.admission import Admission
from decode.balancer import Balancer
from decode.compute import Steps
from decode.config import DecodeConfig
from decode.credit_desk import CreditDesk
from decode.expert_metrics import ExpertMetrics
from decode.leader import GroupReceiver, OtherRanks
from decode.metrics import Metrics
from decode.orders import NOTHING, Placing
from decode.prefixes import Prefixes
from decode.rank import Rank, load
from decode.rank_wire import loads_from_wire
from decode.receiver import OwnReceiver, Receiver
from decode.scheduler import Scheduler
from decode.sender import Sender
from decode.sequence import SequenceRecord
from decode.server import DecodeService
from decode.step_metrics import RankSteps, StepMetrics
from decode.worker import Step, Worker
from engine.blocks import BlockPool
from engine.config import MoeConfig
from engine.dispatch import ExpertMap
from engine.prefix_cache import PrefixCache
from kvtransfer import AgentStats, CacheLayout, TransferEvent
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
from service.ranks.joined import End
from service.ranks.leader import Followers
from service.ranks.wire import collectives_from_wire, sum_of_ranks
from service.routers import Routers
from service.security.settings import Security, instance_security
from service.step_fit import StepFit
from service.wire import counts_to_wire, speed_to_wire

log = logging.getLogger(__name__)

# Of experts that a rank puts in their places between two steps: a few milliseconds of copying.
_SWITCH_BYTES = 8 << 20


class Instance:
    """The ranks, the reservations, the step loop and the gRPC service, joined."""

    def __init__(
        self,
        settings: DecodeConfig,
        model: Model,
        who: Incarnation,
        registry: CollectorRegistry,
        followers: Followers | None,
    ) -> None:
        """`followers` are the other ranks."""
        self.identity = make_identity(model, who)
        self._rank = Rank(
            settings,
            model,
            self.identity,
            on_event=lambda event: self._on_event(event),
            on_sent=lambda event: self.sender.take(0, event),
        )
        self._followers = followers
        self._step_timeout_s = settings.step_timeout_s
        self.sender = Sender(
            settings,
            who.name,
            self._rank.sender,
            tell=followers.tell if followers is not None else lambda *_: None,
            emit=lambda end: self.service.sent_event(end),
        )
        receiver, others = self._join(settings)
        self._balancer = self._balance(settings, model, registry, others)
        self._steps = Steps(
            self._rank.compute,
            depth=settings.pp,
            others=others,
            order=self._balancer.order if self._balancer is not None else lambda: NOTHING,
        )
        self._step_fit = StepFit()
        self._block_tokens = model.block_tokens
        self._step_metrics = StepMetrics(
            registry, ranks=self._rank_steps, most_rows=settings.max_batch * settings.dp
        )
        self.admission = Admission(
            prefixes=self._prefixes(settings, model),
            block_size=settings.block_size,
            max_sequences=settings.max_sequences,
            revoke=receiver.revoke,
            on_end=self._on_end,
            on_room=lambda: self._worker.room(),
            expected_output_tokens=settings.kv_overcommit,
        )
        self._worker = Worker(
            compute=self._steps,
            admission=self.admission,
            scheduler=Scheduler(
                max_batch=settings.max_batch,
                dp=settings.dp,
                depth=settings.pp,
                prompt_tokens=settings.local_prefill_tokens,
                step_tokens=settings.chunk_tokens if settings.colocated else None,
            ),
            emit=self._emit,
            hand_back=lambda record: self.service.hand_back(record),
            on_fatal=die,
            on_paused=lambda record: self.service.paused(record),
        )
        self.service = DecodeService(
            name=who.name,
            epoch=who.epoch,
            config=model.config,
            max_sequence_tokens=model.max_sequence_tokens,
            dp=settings.dp,
            computes_prompts=settings.prompt_tokens > 0,
            drain_timeout_s=settings.drain_timeout_s,
            admission=self.admission,
            worker=self._worker,
            compute=self._steps,
            receiver=receiver,
            sender=self.sender,
            metrics=Metrics(registry, token_bytes=_token_bytes(model.layout)),
        )
        PoolMetrics("decode", registry, heartbeat=self.heartbeat, transfer=self._transfer_stats)

    def _join(self, settings: DecodeConfig) -> tuple[Receiver, OtherRanks | None]:
        """Return the receiving agents as one, and the other ranks where there are any."""

        def emit(event: TransferEvent) -> None:
            self.service.transfer_event(event)

        self._on_event: Callable[[TransferEvent], None] = emit
        if self._followers is None:
            return OwnReceiver(self._rank.agent), None
        group = GroupReceiver(settings, self._rank.agent, self._followers, emit)
        others = OtherRanks(settings, self._followers, lambda *part: self._steps.take(*part))

        def heard(rank: int, message: rank_pb2.FollowRequest) -> None:
            match message.WhichOneof("kind"):
                case "opened":
                    group.opened(rank, message.opened.transfer_id)
                case "sampled":
                    others.sampled(rank, message.sampled)
                case "loads" if self._balancer is not None:
                    self._balancer.took_loads(rank, loads_from_wire(message.loads))
                case "staged" if self._balancer is not None:
                    staged = message.staged
                    self._balancer.staged(rank, staged.number, staged.failed)

        self._on_event = partial(group.take, 0)

        def ended(rank: int, end: End) -> None:
            # Each knows its own transfers by their ids.
            group.take(rank, end)
            self.sender.take(rank, end)

        self._followers.on_end = ended
        self._followers.on_word = heard
        return group, others

    def _on_end(self, record: SequenceRecord) -> None:
        self._steps.remove(record.request_id)
        self.sender.drop(record.request_id)
        self._step_metrics.ended(record.request_id)

    def _balance(
        self,
        settings: DecodeConfig,
        model: Model,
        registry: CollectorRegistry,
        others: OtherRanks | None,
    ) -> Balancer | None:
        """Return what says where experts are, where ranks have different ones."""
        own, moe = self._rank.experts, model.config.moe
        if own is None or others is None or moe is None:
            return None

        def stage(placing: Placing) -> None:
            others.stage(placing)
            own.stage(placing)

        layout = model.runner.layout
        balancer = Balancer(
            even=ExpertMap.even(moe.num_experts, layout, settings.redundant_experts).slots,
            ranks=settings.ranks,
            interval_s=settings.balance_interval_s,
            most_slots=max(1, _SWITCH_BYTES // _expert_bytes(model, moe)),
            stage=stage,
            later=own.later,
        )
        own.on_loads = partial(balancer.took_loads, 0)
        own.on_staged = partial(balancer.staged, 0)
        own.on_switch = ExpertMetrics(registry, balancer.figures).switched
        return balancer

    def _prefixes(self, settings: DecodeConfig, model: Model) -> list[Prefixes]:
        """Return each dp rank's blocks, and what is known of them."""
        # None where there is no prefix cache: routers are then told nothing of one.
        self.journal = PrefixJournal() if settings.prefix_cache else None
        self.prefix_seed = self.identity.compatibility if settings.prefix_cache else b""
        found = []
        for dp_rank in range(settings.dp):
            pool, cache = BlockPool(model.num_blocks), None
            if self.journal is not None:
                cache = PrefixCache(
                    pool,
                    block_size=model.block_tokens,
                    keys=PrefixKeys(seed=self.prefix_seed),
                    on_insert=self.journal.stored,
                    on_evict=self.journal.removed,
                )
            found.append(
                Prefixes(
                    pool,
                    cache=cache,
                    layers=model.config.num_layers,
                    dp_rank=dp_rank,
                    prompts_only=settings.deterministic,
                )
            )
        return found

    def start(self) -> tuple[str, int]:
        """Start the threads; return where this rank takes KV."""
        address = self._rank.agent.start()
        if self._rank.experts is not None:
            self._rank.experts.start()
        self._worker.start()
        return address

    async def watch_steps(self) -> None:
        """End the process where a step hangs."""
        await end_where_a_step_hangs(lambda: self._worker.step_under_way, self._step_timeout_s, die)

    def close(self) -> None:
        """Stop the threads."""
        self._worker.stop()
        if self._rank.experts is not None:
            self._rank.experts.close()
        self._rank.agent.close()
        self._rank.sender.close()

    def _emit(self, step: Step) -> None:
        self._step_metrics.observe(step)
        # Blocks that are held stand for their tokens: a router knows no more of its requests.
        held = self.admission.counts()
        self._step_fit.observe(
            sum(map(len, step.tokens.values())),
            (held.used + held.reserved) * self._block_tokens,
            step.seconds + step.gap_s,
        )
        self.service.emit(step)

    def _rank_steps(self) -> dict[int, RankSteps]:
        found = {
            0: RankSteps(
                seconds=self._rank.compute.watch.seconds, collectives=self._rank.tally.so_far()
            )
        }
        for rank, beat in (self._followers.beats() if self._followers is not None else {}).items():
            found[rank] = RankSteps(
                seconds=dict(beat.step_seconds), collectives=collectives_from_wire(beat)
            )
        return found

    def _transfer_stats(self) -> AgentStats:
        beats = self._followers.beats() if self._followers is not None else {}
        return sum_of_ranks(self._rank.agent.stats(), (beat.transfer for beat in beats.values()))

    def heartbeat(self) -> worker_pb2.Heartbeat:
        """What routers are told again and again."""
        return worker_pb2.Heartbeat(
            blocks=counts_to_wire(self.admission.counts()),
            running=self._worker.running,
            waiting=self._worker.waiting,
            draining=self.service.draining,
            speed=speed_to_wire(self._step_fit.speed),
        )


def _token_bytes(layout: CacheLayout) -> int:
    shapes = [group.shape for group in layout.groups]
    return sum(
        shape.layers * shape.planes * shape.kv_heads * shape.head_size * shape.element_bytes
        for shape in shapes
    )


def _expert_bytes(model: Model, moe: MoeConfig) -> int:
    """Return what a rank's part of an expert takes."""
    inner = moe.intermediate_size // model.runner.layout.etp
    return 3 * model.config.hidden_size * inner * model.runner.cache.tensor.element_size()


async def main(settings: DecodeConfig) -> None:
    """Run one decode instance until it is stopped."""
    who = new_incarnation(settings, "decode")
    configure_logging(
        role="decode",
        instance=log_name(settings, who, 0),
        level=settings.log_level,
        as_json=settings.log_json,
    )
    security = instance_security(settings)
    security.warn_if_exposed("decode instance", settings.host)
    async with led(settings, who, security) as (followers, part):
        await _serve(settings, who, followers, part, security)


async def _serve(
    settings: DecodeConfig,
    who: Incarnation,
    followers: Followers | None,
    part: Part,
    security: Security,
) -> None:
    model = await asyncio.to_thread(load, settings, part)
    registry = new_registry()
    instance = Instance(settings, model, who, registry, followers)
    server = Server(
        "decode",
        host=settings.host,
        port=settings.port,
        reflection=settings.reflection,
        security=security,
    )
    server.add(worker_pb2_grpc.add_DecodeServicer_to_server, instance.service, "twinpool.v1.Decode")
    await server.start()
    data_addresses = [instance.start()]
    try:
        if followers is not None:
            data_addresses += await followers.wait_ready(
                model.num_blocks, model.description.fingerprint
            )
        routers = Routers(
            routers=settings.router,
            hello=make_hello(
                settings,
                model,
                who,
                role=common_pb2.ROLE_DECODE,
                port=server.port,
                max_sequences=settings.max_sequences,
                data_addresses=data_addresses,
                data_token=instance.identity.token,
                prefix_seed=instance.prefix_seed,
                expected_output_tokens=settings.kv_overcommit or 0,
                credits=True,
                local_prefill_tokens=settings.prompt_tokens,
                colocated=settings.colocated,
            ),
            heartbeat=instance.heartbeat,
            assets=lambda: model.assets.files,
            on_peers=instance.sender.update_peers,
            on_drain=lambda _: server.request_stop(),
            prefixes=instance.journal,
            credits=CreditDesk(instance.admission),
            security=security,
        )
        await serve_instance(
            settings,
            server,
            registry,
            routers,
            drain=instance.service.drain,
            background=[instance.service.sweep(), instance.watch_steps()],
        )
    finally:
        instance.close()
