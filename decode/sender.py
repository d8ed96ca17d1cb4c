"""Sends running sequences' KV to other decode instances: all of a sequence at once, from all of its
ranks, as one transfer.

Owns a rank's sending agent, which exists once something is to be sent, and who is joined to which
instance. Knows no sequence's state: who reads a block until when is `Admission`'s to know.
"""

import threading
from collections.abc import Callable, Collection, Sequence

from twinpool.v1 import kv_pb2, rank_pb2, worker_pb2

from decode.config import DecodeConfig
from engine.cache_memory import CacheMemory
from kvtransfer import Closed, Completed, Failed, SendAgent, SendTransfer, Span, TransferEvent
from service.peers import Grant, Peers
from service.ranks.joined import End, JoinedEnds
from service.ranks.leader import Message


class RankSender:
    """One rank's part in what is sent. All methods may be called from any thread.

    Args:
        make: Makes the agent, when it is first needed.
        layers: Layers of the model, over all ranks.
        memory: What the agent reads.
    """

    def __init__(self, make: Callable[[], SendAgent], layers: int, memory: CacheMemory) -> None:
        self._make = make
        self._layers = layers
        self._memory = memory
        self._lock = threading.Lock()
        self._agent: SendAgent | None = None
        self._peers: Peers | None = None

    def update(self, peers: Sequence[worker_pb2.Peer]) -> None:
        """Connect to these instances, and to no others."""
        with self._lock:
            if self._peers is None:
                self._agent = self._make()
                self._agent.start()
                self._peers = Peers(self._agent)
            self._peers.update(peers)

    def grant(self, message: kv_pb2.Grant) -> Grant:
        """See Peers.grant; `update` has been called. Raises WorkFailed."""
        with self._lock:
            assert self._peers is not None
            return self._peers.grant(message)

    def send(self, grant: Grant, blocks: Sequence[int]) -> None:
        """Send a sequence's first tokens, as many as the grant is for, from these blocks."""
        agent = self._agent
        assert agent is not None
        agent.begin(
            SendTransfer(
                transfer_id=grant.transfer_id,
                epoch=grant.epoch,
                nonce=grant.nonce,
                target_instance=grant.instance,
                target_layout=grant.layout,
                tokens=grant.tokens,
                total_tokens=grant.tokens.end,
                block_ids=(tuple(blocks),),
                ttl_s=grant.ttl_s,
                kept=grant.kept,
            )
        )
        # What it has decoded was computed here, and never came over the memory.
        self._memory.save(self._memory.layers, blocks)
        self._memory.then(
            lambda: agent.ready(grant.transfer_id, Span(0, self._layers), Span(0, grant.tokens.end))
        )

    def abort(self, transfer_id: int) -> None:
        """End a transfer; its end is told."""
        if self._agent is not None:
            self._agent.abort(transfer_id)

    def close(self) -> None:
        """End all transfers and connections."""
        if self._agent is not None:
            self._agent.close()


class Sender:
    """What an instance's ranks send, as one.

    Nothing is connected before `connect`, so that instances of which none drains cost each other
    nothing. A transfer ends when no rank has a part in it any more.

    Args:
        name: The instance's, which is no peer of its own.
        own: This rank's part, the first one's.
        tell: Tells some of the other ranks, or all.
        emit: Told of each transfer's end, from any thread.
    """

    def __init__(
        self,
        settings: DecodeConfig,
        name: str,
        own: RankSender,
        *,
        tell: Callable[[Message, Collection[int] | None], None],
        emit: Callable[[End], None],
    ) -> None:
        self._settings = settings
        self._name = name
        self._own = own
        self._tell = tell
        self._emit = emit
        self._lock = threading.Lock()
        self._ends = JoinedEnds(len(settings.dp_ranks(0)))
        self._transfer_of: dict[int, int] = {}  # by request, its latest while that one runs
        self._open: dict[int, tuple[int, range]] = {}  # by transfer: the request, and its ranks
        self._peers: list[worker_pb2.Peer] = []
        self._connects = False

    def ranks_of(self, dp_rank: int) -> range:
        """Return the ranks that a dp rank's sequences are on."""
        return self._settings.dp_ranks(dp_rank)

    def update_peers(self, peers: Sequence[worker_pb2.Peer]) -> None:
        """The decode instances that there are now."""
        with self._lock:
            self._peers = [peer for peer in peers if peer.name != self._name]
            if self._connects:
                self._update()

    def connect(self) -> None:
        """Connect all ranks to the peers, and stay connected from here on."""
        with self._lock:
            if not self._connects:
                self._connects = True
                self._update()

    def send(
        self, request_id: int, dp_rank: int, blocks: Sequence[int], message: kv_pb2.Grant
    ) -> None:
        """Send a sequence that no step touches; its end is told through `emit`.

        Raises WorkFailed where the instance that has given the grant is not known: nothing is told
        then.
        """
        self.connect()
        grant = self._own.grant(message)
        ranks = self.ranks_of(dp_rank)
        with self._lock:
            self._transfer_of[request_id] = grant.transfer_id
            self._open[grant.transfer_id] = request_id, ranks
            self._ends.begin(grant.transfer_id)
            if 0 in ranks:
                self._own.send(grant, blocks)
            order = rank_pb2.RankSend(blocks=blocks, grant=message)
            self._tell(Message(send=order), ranks)

    def drop(self, request_id: int) -> None:
        """End the request's transfer, if there is one."""
        with self._lock:
            transfer_id = self._transfer_of.get(request_id)
            if transfer_id is not None:
                self._give_up(transfer_id)

    def take(self, rank: int, event: TransferEvent) -> None:
        """A rank's agent has something to say; from any thread."""
        if not isinstance(event, Completed | Failed | Closed):
            return
        with self._lock:
            joined = self._ends.take(rank, event)
            if joined.give_up:
                self._give_up(event.transfer_id)
            if joined.end is not None:
                request_id, _ = self._open.pop(event.transfer_id)
                # It may have been sent anew since.
                if self._transfer_of.get(request_id) == event.transfer_id:
                    del self._transfer_of[request_id]
        if joined.end is not None:
            self._emit(joined.end)

    def _update(self) -> None:
        self._own.update(self._peers)
        self._tell(Message(peers=worker_pb2.Peers(peers=self._peers)), None)

    def _give_up(self, transfer_id: int) -> None:
        _, ranks = self._open[transfer_id]
        if 0 in ranks:
            self._own.abort(transfer_id)
        self._tell(Message(abort=rank_pb2.RankAbort(transfer_id=transfer_id)), ranks)
