"""A rank of a prefill instance that is not its first: its part of each step and each transfer.

Decides nothing.
"""

import asyncio
from functools import partial

from twinpool.v1 import rank_pb2

from kvtransfer import Closed, Completed, Failed, SharedRegion, TransferEvent
from prefill.config import PrefillConfig
from prefill.rank import Rank, load
from prefill.rank_wire import step_from_wire
from service.instance import Incarnation, Model, Part, make_identity
from service.ranks.follower import Orders, Say
from service.ranks.wire import end_to_wire, heartbeat_to_wire
from service.wire import span_from_wire


class Follower:
    """Acts on what the first rank says, in order: on a thread what needs the cache's contents, the
    steps and what follows from them, all else at once. See service.ranks.follower.Member.

    Args:
        region: Where the model's cache was allocated; closed with the rest.
    """

    def __init__(
        self,
        settings: PrefillConfig,
        model: Model,
        who: Incarnation,
        region: SharedRegion,
        say: Say,
    ) -> None:
        self._model = model
        self._region = region
        self._say = say
        self._rank = Rank(settings, model, make_identity(model, who), region, self._on_event)
        self._orders = Orders("prefill-rank")

    def start(self) -> rank_pb2.RankReady:
        """See Member."""
        self._rank.agent.start()
        self._orders.start()
        model = self._model
        return rank_pb2.RankReady(
            blocks=model.num_blocks, fingerprint=model.description.fingerprint
        )

    def beat(self) -> rank_pb2.RankHeartbeat:
        """See Member."""
        return heartbeat_to_wire(self._rank.agent.stats(), self._rank.links)

    def close(self) -> None:
        """See Member."""
        self._orders.stop()
        self._rank.agent.close()
        self._region.close()

    def act(self, message: rank_pb2.FollowResponse) -> None:
        """See Member."""
        rank, handoff = self._rank, self._rank.handoff
        match message.WhichOneof("kind"):
            case "step":
                self._orders.put(partial(rank.compute.run, step_from_wire(message.step)))
            case "peers":
                rank.peers.update(message.peers.peers)
            case "expect":
                handoff.expect(message.expect.request_id)
            case "open":
                opened = message.open
                handoff.open(opened.request_id, opened.tokens, list(opened.blocks), opened.cp_first)
            case "grant":
                granted = message.grant
                handoff.grant(granted.request_id, rank.peers.grant(granted.grant))
            case "ready":
                ready = message.ready
                tokens = span_from_wire(ready.tokens)
                # Computed by a step that this rank may not have come to yet.
                self._orders.put(partial(handoff.cached, ready.request_id, tokens))
            case "close":
                handoff.close(message.close.request_id)
            case "abort":
                rank.agent.abort(message.abort.transfer_id)

    def _on_event(self, event: TransferEvent) -> None:
        if isinstance(event, Completed | Failed | Closed):
            self._rank.handoff.ended(event.transfer_id)
            self._say(rank_pb2.FollowRequest(transfer_end=end_to_wire(event)))


async def make_follower(
    settings: PrefillConfig, part: Part, who: Incarnation, say: Say
) -> Follower:
    """Load the model's part, and make the rank that has it."""
    region = SharedRegion()  # so that a decode instance on this host can read the cache itself
    try:
        model = await asyncio.to_thread(load, settings, part, region)
        return Follower(settings, model, who, region, say)
    except BaseException:
        region.close()
        raise
