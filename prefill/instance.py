"""One prefill instance from start to drain: builds the parts and joins them.

Owns the order in which they start and stop.
"""

import logging

from prometheus_client import CollectorRegistry
from twinpool.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from engine.blocks import BlockPool
from engine.prefix_cache import PrefixCache
from kvtransfer import SendAgent, SharedRegion, TransferSettings
from kvtransfer.hardware import describe_rdma
from kvtransfer.network import NetworkTransport
from prefill.compute import RankCompute
from prefill.config import PrefillConfig
from prefill.handoff import Handoff
from prefill.metrics import Metrics
from prefill.scheduler import Scheduler
from prefill.server import Peers, PrefillService
from prefill.worker import Worker
from service.instance import (
    Incarnation,
    Model,
    die,
    load_model,
    make_hello,
    make_identity,
    new_incarnation,
    serve_instance,
)
from service.lifecycle import Server
from service.logs import configure_logging
from service.metrics import new_registry
from service.pool_metrics import PoolMetrics
from service.registration import Registration
from service.wire import counts_to_wire, pairs_to_wire

log = logging.getLogger(__name__)


class Instance:
    """The transfer agent, the engine's thread and the gRPC service, joined."""

    def __init__(
        self,
        settings: PrefillConfig,
        model: Model,
        who: Incarnation,
        registry: CollectorRegistry,
        region: SharedRegion,
    ) -> None:
        """`region` is where the model's cache was allocated."""
        identity = make_identity(model, who)
        transport = NetworkTransport()
        log.info(describe_rdma(driven=transport.rdma))
        self._agent = SendAgent(
            transport=transport,
            memories=(model.runner.cache.tensor,),
            layout=model.layout,
            rank=0,
            identity=identity,
            settings=TransferSettings(host=settings.data_host, lane=settings.kv_lane),
            on_event=lambda event: self._worker.transfer_event(event),
            region=region,
        )
        shape = model.layout.groups[0].shape
        handoff = Handoff(self._agent, shape.layers)
        pool = BlockPool(model.num_blocks)
        cache = (
            PrefixCache(
                pool, block_size=settings.block_size, fingerprint=identity.compatibility.hex()
            )
            if settings.prefix_cache
            else None
        )
        self._worker = Worker(
            compute=RankCompute(model.runner, shape, handoff),
            block_tokens=settings.block_size,
            pool=pool,
            cache=cache,
            scheduler=Scheduler(
                max_batched_tokens=max(settings.max_batched_tokens, settings.block_size),
                block_size=settings.block_size,
            ),
            transfers=handoff,
            emit=lambda request_id, outcome: self.service.emit(request_id, outcome),
            on_fatal=die,
        )
        self.peers = Peers(self._agent)
        self.service = PrefillService(
            name=who.name,
            config=model.config,
            total_blocks=model.num_blocks,
            max_queue=settings.max_queue,
            worker=self._worker,
            handoff=handoff,
            peers=self.peers,
            metrics=Metrics(registry),
        )
        PoolMetrics("prefill", registry, heartbeat=self.heartbeat, transfer=self._agent.stats)

    def start(self) -> None:
        """Start the threads."""
        self._agent.start()
        self._worker.start()

    def close(self) -> None:
        """Stop the threads."""
        self._worker.stop()
        self._agent.close()

    def heartbeat(self) -> worker_pb2.Heartbeat:
        """What routers are told again and again."""
        load = self._worker.load()
        return worker_pb2.Heartbeat(
            blocks=counts_to_wire(load.blocks),
            running=load.running,
            waiting=load.waiting,
            draining=self.service.draining,
            pairs=pairs_to_wire(self._agent.stats().peers),
        )


async def main(settings: PrefillConfig) -> None:
    """Run one prefill instance until it is stopped."""
    who = new_incarnation(settings, "prefill")
    configure_logging(
        role="prefill", instance=who.name, level=settings.log_level, as_json=settings.log_json
    )
    region = SharedRegion()  # so that a decode instance on this host can read the cache itself
    model = load_model(settings, region.allocate)
    registry = new_registry()
    instance = Instance(settings, model, who, registry, region)
    server = Server(
        "prefill", host=settings.host, port=settings.port, reflection=settings.reflection
    )
    server.add(
        worker_pb2_grpc.add_PrefillServicer_to_server, instance.service, "twinpool.v1.Prefill"
    )
    await server.start()
    instance.start()
    try:
        registration = Registration(
            router_address=settings.router,
            hello=make_hello(
                settings,
                model,
                who,
                role=common_pb2.ROLE_PREFILL,
                port=server.port,
                max_sequences=settings.max_queue,
            ),
            heartbeat=instance.heartbeat,
            assets=lambda: model.assets.files,
            on_peers=instance.peers.update,
            on_drain=lambda _: server.request_stop(),
        )
        await serve_instance(
            settings,
            server,
            registry,
            drain=instance.service.drain,
            background=[registration.run()],
        )
    finally:
        instance.close()
        region.close()
