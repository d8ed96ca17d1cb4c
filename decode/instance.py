"""One decode instance from start to drain: builds the parts and joins them.

Owns the order in which they start and stop.
"""

import gc
import secrets
from contextlib import ExitStack

from twinpool.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from decode.admission import Admission
from decode.config import DecodeConfig
from decode.metrics import Metrics
from decode.scheduler import Scheduler
from decode.server import DecodeService
from decode.worker import Worker
from engine.blocks import BlockPool
from kvtransfer import (
    PROTOCOL_VERSION,
    Identity,
    ReceiveAgent,
    TransferSettings,
    compatibility_hash,
)
from kvtransfer.ucx import UcxTransport
from service.instance import die, load_model, make_hello, new_incarnation
from service.lifecycle import Server
from service.logs import configure_logging
from service.metrics import MetricsEndpoint, new_registry
from service.pool_metrics import PoolMetrics
from service.registration import Registration
from service.wire import counts_to_wire


async def main(settings: DecodeConfig) -> None:
    """Run one decode instance until it is stopped."""
    who = new_incarnation(settings, "decode")
    configure_logging(
        role="decode", instance=who.name, level=settings.log_level, as_json=settings.log_json
    )
    model = load_model(settings)
    registry = new_registry()
    identity = Identity(
        instance=who.name,
        epoch=who.epoch,
        compatibility=compatibility_hash(
            PROTOCOL_VERSION, model.description.fingerprint, model.layout.shape
        ),
        token=secrets.token_bytes(16),
    )
    agent = ReceiveAgent(
        transport=UcxTransport(),
        memory=model.runner.cache.tensor,
        layout=model.layout,
        rank=0,
        identity=identity,
        settings=TransferSettings(
            host=settings.data_host, port=settings.data_port, checksum=settings.checksum
        ),
        on_event=lambda event: service.transfer_event(event),
    )
    admission = Admission(
        pool=BlockPool(model.num_blocks),
        block_size=settings.block_size,
        max_sequences=settings.max_sequences,
        revoke=agent.revoke,
    )
    worker = Worker(
        runner=model.runner,
        admission=admission,
        scheduler=Scheduler(max_batch=settings.max_batch),
        emit=lambda step: service.emit(step),
        on_fatal=die,
    )
    service = DecodeService(
        name=who.name,
        epoch=who.epoch,
        config=model.config,
        max_sequence_tokens=model.max_sequence_tokens,
        admission=admission,
        worker=worker,
        agent=agent,
        metrics=Metrics(registry),
    )

    def heartbeat() -> worker_pb2.Heartbeat:
        return worker_pb2.Heartbeat(
            blocks=counts_to_wire(admission.counts()),
            running=worker.running,
            waiting=worker.waiting,
            draining=service.draining,
        )

    PoolMetrics("decode", registry, heartbeat=heartbeat, transfer=agent.stats)
    server = Server(
        "decode", host=settings.host, port=settings.port, reflection=settings.reflection
    )
    server.add(worker_pb2_grpc.add_DecodeServicer_to_server, service, "twinpool.v1.Decode")
    await server.start()
    data_address = agent.start()
    worker.start()
    registration = Registration(
        router_address=settings.router,
        hello=make_hello(
            settings,
            model,
            who,
            role=common_pb2.ROLE_DECODE,
            port=server.port,
            max_sequences=settings.max_sequences,
            data_addresses=[data_address],
            data_token=identity.token,
        ),
        heartbeat=heartbeat,
        assets=lambda: model.assets.files,
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
            background=[registration.run(), service.sweep()],
        )
