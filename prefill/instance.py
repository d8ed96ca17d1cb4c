"""One prefill instance from start to drain: builds the parts and joins them.

Owns the order in which they start and stop.
"""

import gc
import secrets
from contextlib import ExitStack

from twinpool.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from engine.blocks import BlockPool
from kvtransfer import (
    PROTOCOL_VERSION,
    Identity,
    SendAgent,
    TransferSettings,
    compatibility_hash,
)
from kvtransfer.ucx import UcxTransport
from prefill.config import PrefillConfig
from prefill.handoff import Handoff
from prefill.metrics import Metrics
from prefill.scheduler import Scheduler
from prefill.server import Peers, PrefillService
from prefill.worker import Worker
from service.instance import die, load_model, make_hello, new_incarnation
from service.lifecycle import Server
from service.logs import configure_logging
from service.metrics import MetricsEndpoint, new_registry
from service.pool_metrics import PoolMetrics
from service.registration import Registration
from service.wire import counts_to_wire


async def main(settings: PrefillConfig) -> None:
    """Run one prefill instance until it is stopped."""
    who = new_incarnation(settings, "prefill")
    configure_logging(
        role="prefill", instance=who.name, level=settings.log_level, as_json=settings.log_json
    )
    model = load_model(settings)
    registry = new_registry()
    agent = SendAgent(
        transport=UcxTransport(),
        memory=model.runner.cache.tensor,
        layout=model.layout,
        rank=0,
        identity=Identity(
            instance=who.name,
            epoch=who.epoch,
            compatibility=compatibility_hash(
                PROTOCOL_VERSION, model.description.fingerprint, model.layout.shape
            ),
            token=secrets.token_bytes(16),
        ),
        settings=TransferSettings(host=settings.data_host, checksum=settings.checksum),
        on_event=lambda event: worker.transfer_event(event),
    )
    handoff = Handoff(agent)
    worker = Worker(
        runner=model.runner,
        pool=BlockPool(model.num_blocks),
        scheduler=Scheduler(max_batched_tokens=settings.max_batched_tokens),
        handoff=handoff,
        emit=lambda request_id, outcome: service.emit(request_id, outcome),
        on_fatal=die,
    )
    peers = Peers(agent)
    service = PrefillService(
        name=who.name,
        config=model.config,
        total_blocks=model.num_blocks,
        max_queue=settings.max_queue,
        worker=worker,
        handoff=handoff,
        peers=peers,
        metrics=Metrics(registry),
    )

    def heartbeat() -> worker_pb2.Heartbeat:
        return worker_pb2.Heartbeat(
            blocks=counts_to_wire(worker.load().blocks),
            running=worker.load().running,
            waiting=worker.load().waiting,
            draining=service.draining,
        )

    PoolMetrics("prefill", registry, heartbeat=heartbeat, transfer=agent.stats)
    server = Server(
        "prefill", host=settings.host, port=settings.port, reflection=settings.reflection
    )
    server.add(worker_pb2_grpc.add_PrefillServicer_to_server, service, "twinpool.v1.Prefill")
    await server.start()
    agent.start()
    worker.start()
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
        heartbeat=heartbeat,
        assets=lambda: model.assets.files,
        on_peers=peers.update,
        on_drain=lambda _: server.request_stop(),
    )
    gc.freeze()  # the model is here to stay: collections need not look at it again
    with ExitStack() as stack:
        stack.callback(agent.close)
        stack.callback(worker.stop)
        if settings.metrics_port:
            stack.enter_context(MetricsEndpoint(registry, port=settings.metrics_port))
        await server.serve_until_stopped(
            drain=service.drain,
            drain_timeout_s=settings.drain_timeout_s,
            background=[registration.run()],
        )
