"""A rank of a decode instance that is not its first: its part of each step and each transfer.

Decides nothing.
"""

import asyncio
from functools import partial

from twinpool.v1 import rank_pb2

from decode.compute import Rows
from decode.config import DecodeConfig
from decode.orders import Loads, Order
from decode.rank import Rank, load
from decode.rank_wire import (
    loads_to_wire,
    order_from_wire,
    part_to_wire,
    placing_from_wire,
    receive_from_wire,
    rows_from_wire,
    sequence_from_wire,
)
from kvtransfer import Closed, Completed, Failed, TransferEvent
from service.instance import Incarnation, Model, Part, make_identity
from service.ranks.follower import Orders, Say
from service.ranks.wire import end_to_wire, heartbeat_to_wire


class Follower:
    """Acts on what the first rank says, in order: transfers at once, and on a thread the steps and
    the comings and goings of sequences. See service.ranks.follower.Member.
    """

    def __init__(self, settings: DecodeConfig, model: Model, who: Incarnation, say: Say) -> None:
        self._model = model
        self._epoch = who.epoch
        self._say = say
        identity = make_identity(model, who)
        self._rank = Rank(settings, model, identity, self._on_event, self._on_event)
        self._orders = Orders("decode-rank")
        if self._rank.experts is not None:
            self._rank.experts.on_loads = self._took_loads
            self._rank.experts.on_staged = self._staged

    def start(self) -> rank_pb2.RankReady:
        """See Member."""
        host, port = self._rank.agent.start()
        self._orders.start()
        if self._rank.experts is not None:
            self._rank.experts.start()
        return rank_pb2.RankReady(
            blocks=self._model.num_blocks,
            fingerprint=self._model.description.fingerprint,
            data_host=host,
            data_port=port,
        )

    def beat(self) -> rank_pb2.RankHeartbeat:
        """See Member."""
        rank = self._rank
        return heartbeat_to_wire(
            rank.agent.stats(),
            rank.links,
            step_seconds=rank.compute.watch.seconds,
            collectives=rank.tally.so_far(),
        )

    def close(self) -> None:
        """See Member."""
        if self._rank.experts is not None:
            self._rank.experts.close()
        self._orders.stop()
        self._rank.agent.close()
        self._rank.sender.close()

    def act(self, message: rank_pb2.FollowResponse) -> None:
        """See Member."""
        compute, put = self._rank.compute, self._orders.put
        match message.WhichOneof("kind"):
            case "decode":
                step = message.decode
                put(partial(self._step, step.number, rows_from_wire(step), order_from_wire(step)))
            case "sequence":
                sequence = message.sequence
                put(partial(compute.add, sequence.request_id, sequence_from_wire(sequence)))
            case "grow":
                put(partial(compute.grow, message.grow.request_id, list(message.grow.blocks)))
            case "forget":
                put(partial(compute.remove, message.forget.request_id))
            case "placing":
                assert self._rank.experts is not None
                self._rank.experts.stage(placing_from_wire(message.placing))
            case "receive":
                receive = message.receive
                self._rank.agent.open(receive_from_wire(receive, self._epoch))
                opened = rank_pb2.RankOpened(transfer_id=receive.transfer_id)
                self._say(rank_pb2.FollowRequest(opened=opened))
            case "revoke":
                self._rank.agent.revoke(message.revoke.transfer_id)
            case "peers":
                self._rank.sender.update(message.peers.peers)
            case "send":
                grant = self._rank.sender.grant(message.send.grant)
                # After the sequence's last step, which this rank may not have come to the end of.
                put(partial(self._rank.sender.send, grant, list(message.send.blocks)))
            case "abort":
                put(partial(self._rank.sender.abort, message.abort.transfer_id))

    def _step(self, number: int, rows: Rows, order: Order) -> None:
        part = self._rank.compute.run(rows, order)
        if part is not None:
            self._say(rank_pb2.FollowRequest(sampled=part_to_wire(number, part)))

    def _took_loads(self, loads: Loads) -> None:
        self._say(rank_pb2.FollowRequest(loads=loads_to_wire(loads)))

    def _staged(self, number: int, failed: str) -> None:
        staged = rank_pb2.RankStaged(number=number, failed=failed)
        self._say(rank_pb2.FollowRequest(staged=staged))

    def _on_event(self, event: TransferEvent) -> None:
        if isinstance(event, Completed | Failed | Closed):
            self._say(rank_pb2.FollowRequest(transfer_end=end_to_wire(event)))


async def make_follower(settings: DecodeConfig, part: Part, who: Incarnation, say: Say) -> Follower:
    """Load the model's part, and make the rank that has it."""
    model = await asyncio.to_thread(load, settings, part)
    return Follower(settings, model, who, say)
