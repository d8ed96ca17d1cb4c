"""What every rank of an instance has: its part of the model, and the agent that sends its KV."""

import logging
from collections.abc import Callable
from dataclasses import replace

from kvtransfer import Identity, SendAgent, SharedRegion, TransferEvent, TransferSettings
from kvtransfer.hardware import describe_rdma
from kvtransfer.network import NetworkTransport
from prefill.compute import RankCompute
from prefill.config import PrefillConfig
from prefill.handoff import Handoff
from service.instance import Model, Part, load_model
from service.peers import Peers

log = logging.getLogger(__name__)


class Rank:
    """One rank's compute, and the transfers of what it computes.

    Args:
        region: Where the model's cache was allocated.
        on_event: Told what the agent has to say, in the agent's thread.
    """

    def __init__(
        self,
        settings: PrefillConfig,
        model: Model,
        identity: Identity,
        region: SharedRegion,
        on_event: Callable[[TransferEvent], None],
    ) -> None:
        transport = NetworkTransport()
        log.info(describe_rdma(driven=transport.rdma))
        shape = model.layout.groups[0].shape
        self.agent = SendAgent(
            transport=transport,
            memories=(model.memory.tensor,),
            layout=model.layout,
            rank=model.part.rank,
            identity=identity,
            settings=TransferSettings(host=settings.data_host, lane=settings.kv_lane),
            on_event=on_event,
            region=region,
            boxes=model.memory.boxes,
        )
        runner, memory = model.runner, model.memory
        self.handoff = Handoff(self.agent, shape.layers, runner.local_blocks, memory.then)
        layers = model.part.layout.layers(shape.layers)
        self.compute = RankCompute(runner, memory, shape, layers, self.handoff)
        self.peers = Peers(self.agent)
        # What it exchanges with other ranks in steps, by the sort of link.
        self.links = {name: wire.traffic for name, wire in model.part.wires.items()}


def load(settings: PrefillConfig, part: Part, region: SharedRegion) -> Model:
    """Load a rank's part of the model, with its cache in `region`; see service.instance."""
    part = replace(part, ring_mode=settings.ring, most_grain=settings.max_batched_tokens)
    return load_model(settings, region.allocate, part, settings.rank_threads)
