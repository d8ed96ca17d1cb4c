"""One decode instance from start to drain: builds the parts and joins them.

Owns the order in which they start and stop.
"""

import logging

from prometheus_client import CollectorRegistry
from twinpool.v1 import common_pb2, worker_pb2, worker_pb2_grpc

from decode.admission import Admission
from decode.config import DecodeConfig
from decode.metrics import Metrics
from decode.scheduler import Scheduler
from decode.server import DecodeService
from decode.worker import Worker
from engine.blocks import BlockPool
from kvtransfer import ReceiveAgent, TransferSettings
from kvtransfer.hardware import describe_rdma
from kvtransfer.network import NetworkTransport
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
from service.wire import counts_to_wire

log = logging.getLogger(__name__)


class Instance:
    """The transfer agent, the reservations, the step loop and the gRPC service, joined."""

    def __init__(
        self, settings: DecodeConfig, model: Model, who: Incarnation, registry: CollectorRegistry
    ) -> None:
        self.identity = make_identity(model, who)
        transport = NetworkTransport()
        log.info(describe_rdma(driven=transport.rdma))
        self._agent = ReceiveAgent(
            transport=transport,
            memories=(model.runner.cache.tensor,),
            layout=model.layout,
            rank=0,
            identity=self.identity,
            settings=TransferSettings(
                host=settings.data_host,
                port=settings.data_port,
                lane=settings.kv_lane,
                checksum=settings.checksum,
            ),
            on_event=lambda event: self.service.transfer_event(event),
        )
        self._admission = Admission(
            pool=BlockPool(model.num_blocks),
            block_size=settings.block_size,
            max_sequences=settings.max_sequences,
            revoke=self._agent.revoke,
        )
        self._worker = Worker(
            runner=model.runner,
            admission=self._admission,
            scheduler=Scheduler(max_batch=settings.max_batch),
            emit=lambda step: self.service.emit(step),
            on_fatal=die,
        )
        self.service = DecodeService(
            name=who.name,
            epoch=who.epoch,
            config=model.config,
            max_sequence_tokens=model.max_sequence_tokens,
            admission=self._admission,
            worker=self._worker,
            agent=self._agent,
            metrics=Metrics(registry),
        )
        PoolMetrics("decode", registry, heartbeat=self.heartbeat, transfer=self._agent.stats)

    def start(self) -> tuple[str, int]:
        """Start the threads; return where KV is taken."""
        address = self._agent.start()
        self._worker.start()
        return address

    def close(self) -> None:
        """Stop the threads."""
        self._worker.stop()
        self._agent.close()

    def heartbeat(self) -> worker_pb2.Heartbeat:
        """What routers are told again and again."""
        return worker_pb2.Heartbeat(
            blocks=counts_to_wire(self._admission.counts()),
            running=self._worker.running,
            waiting=self._worker.waiting,
            draining=self.service.draining,
        )


async def main(settings: DecodeConfig) -> None:
    """Run one decode instance until it is stopped."""
    who = new_incarnation(settings, "decode")
    configure_logging(
        role="decode", instance=who.name, level=settings.log_level, as_json=settings.log_json
    )
    model = load_model(settings)
    registry = new_registry()
    instance = Instance(settings, model, who, registry)
    server = Server(
        "decode", host=settings.host, port=settings.port, reflection=settings.reflection
    )
    server.add(worker_pb2_grpc.add_DecodeServicer_to_server, instance.service, "twinpool.v1.Decode")
    await server.start()
    data_address = instance.start()
    try:
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
                data_token=instance.identity.token,
            ),
            heartbeat=instance.heartbeat,
            assets=lambda: model.assets.files,
            on_drain=lambda _: server.request_stop(),
        )
        await serve_instance(
            settings,
            server,
            registry,
            drain=instance.service.drain,
            background=[registration.run(), instance.service.sweep()],
        )
    finally:
        instance.close()
