"""What every rank of a decode instance has: its part of the model, the agent that takes KV, and the
one that sends what is there elsewhere.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

from rich.progress import MofNCompleteColumn

from decode.compute import RankCompute
from decode.config import DecodeConfig
from decode.rank_experts import RankExperts
from decode.sender import RankSender
from engine.ring.comm import Traffic
from kvtransfer import (
    Identity,
    ReceiveAgent,
    SendAgent,
    SharedRegion,
    TransferEvent,
    TransferSettings,
)
from kvtransfer.hardware import describe_rdma
from kvtransfer.network import NetworkTransport
from service.instance import Model, Part, load_model, progress_bar

log = logging.getLogger(__name__)


class Rank:
    """One rank's compute, and the transfers of what it computes with.

    Args:
        on_event: Told what the receiving agent has to say, in the agent's thread.
        on_sent: Likewise of the sending one.
    """

    def __init__(
        self,
        settings: DecodeConfig,
        model: Model,
        identity: Identity,
        on_event: Callable[[TransferEvent], None],
        on_sent: Callable[[TransferEvent], None],
    ) -> None:
        layout, rank = model.part.layout, model.part.rank
        transport = NetworkTransport()
        part = model.layout.dp_rank(layout.dp_rank, layout.dp)
        log.info(describe_rdma(driven=transport.rdma))
        self.agent = ReceiveAgent(
            transport=transport,
            memories=(model.memory.tensor,),
            layout=part,
            rank=rank,
            identity=identity,
            settings=TransferSettings(
                host=settings.data_host,
                port=settings.data_port + rank if settings.data_port else 0,
                lane=settings.kv_lane,
                checksum=settings.checksum,
            ),
            on_event=on_event,
            boxes=model.memory.boxes,
            on_landed=lambda _, layers, blocks: model.memory.load(
                range(layers.begin, layers.end), blocks
            ),
        )
        # Its own transport, since each agent drives one. The host's cache lies in no shared region,
        # whose pages might be slower to decode from, so that a receiver has to be sent it; of a
        # GPU's the region has the leases.
        boxes = model.memory.boxes
        self.sender = RankSender(
            lambda: SendAgent(
                transport=NetworkTransport(),
                memories=(model.memory.tensor,),
                layout=part,
                rank=rank,
                identity=identity,
                settings=TransferSettings(
                    host=settings.data_host,
                    lane="auto" if settings.kv_lane == "mapped" else settings.kv_lane,
                ),
                on_event=on_sent,
                region=SharedRegion() if boxes else None,
                boxes=boxes,
            ),
            model.config.num_layers,
            model.memory,
        )
        # None where all ranks have the same experts, or parts of the same.
        self.experts = (
            RankExperts(model.runner, settings.model.expanduser()) if settings.ep > 1 else None
        )
        self.compute = RankCompute(model.runner, model.memory, self.experts)
        self.tally = model.runner.tally
        # What it exchanges with other ranks in steps, by the sort of link.
        self.links: dict[str, Traffic] = {
            name: wire.traffic for name, wire in model.part.wires.items()
        }


def load(settings: DecodeConfig, part: Part) -> Model:
    """Load a rank's part of the model; see service.instance."""
    part = replace(part, dispatch=settings.dispatch, redundant_experts=settings.redundant_experts)
    model = load_model(settings, None, part, settings.rank_threads, keeps_logits=True)
    runner = model.runner
    if settings.device == "cuda":
        with progress_bar("recording steps", MofNCompleteColumn()) as progress:
            runner.record_steps(settings.max_batch, model.max_sequence_tokens, progress)
    runner.experts.measure(settings.max_batch)
    runner.tally.take()  # those were no steps
    return model
