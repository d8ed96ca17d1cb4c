"""The first rank of a prefill instance and the others: what they are told of steps and transfers.

All ranks do the same things in the same order, so that the first one knows what each of them has
begun; when their transfers end they tell (service.ranks).
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from twinpool.v1 import rank_pb2, worker_pb2

from kvtransfer import Closed, Completed, Failed, SendAgent, Span, TransferEvent
from prefill.compute import Piece
from prefill.handoff import Handoff
from prefill.rank_wire import step_to_wire
from service.peers import Grant, grant_to_wire
from service.ranks.joined import JoinedEnds
from service.ranks.leader import Message
from service.wire import span_to_wire


class GroupTransfers:
    """The transfers of all ranks of an instance as one; see handoff.Transfers.

    Args:
        own: Those of this rank, which stand for all: every rank begins the same ones.
        tell: Tells the other ranks.
        emit: Called with the end of each transfer, when no rank has a part in it any more.
    """

    def __init__(
        self,
        own: Handoff,
        agent: SendAgent,
        ranks: int,
        tell: Callable[[Message], None],
        emit: Callable[[TransferEvent], None],
    ) -> None:
        self._own = own
        self._agent = agent
        self._emit = emit
        self._ends = JoinedEnds(ranks)
        self._lock = threading.Lock()
        self._tell = tell

    def expect(self, request_id: int) -> None:
        """See Transfers."""
        with self._lock:
            self._own.expect(request_id)
            self._tell(Message(expect=rank_pb2.RankExpect(request_id=request_id)))

    def open(
        self, request_id: int, tokens: int, block_ids: Sequence[int], cp_first: int = 0
    ) -> None:
        """See Transfers."""
        with self._lock:
            with self._noting_begin(request_id):
                self._own.open(request_id, tokens, block_ids, cp_first)
            opened = rank_pb2.RankOpen(
                request_id=request_id, tokens=tokens, blocks=block_ids, cp_first=cp_first
            )
            self._tell(Message(open=opened))

    def grant(self, request_id: int, grant: Grant) -> None:
        """See Transfers."""
        with self._lock:
            with self._noting_begin(request_id):
                self._own.grant(request_id, grant)
            granted = rank_pb2.RankGrant(request_id=request_id, grant=grant_to_wire(grant))
            self._tell(Message(grant=granted))

    def cached(self, request_id: int, tokens: Span) -> None:
        """See Transfers."""
        with self._lock:
            self._own.cached(request_id, tokens)
            ready = rank_pb2.RankReadyTokens(request_id=request_id, tokens=span_to_wire(tokens))
            self._tell(Message(ready=ready))

    def close(self, request_id: int) -> bool:
        """See Transfers."""
        with self._lock:
            self._tell(Message(close=rank_pb2.RankClose(request_id=request_id)))
            return self._own.close(request_id)

    def ended(self, transfer_id: int) -> int | None:
        """See Transfers."""
        return self._own.ended(transfer_id)

    def take(self, rank: int, event: TransferEvent) -> None:
        """A rank's agent has something to say; from any thread."""
        if not isinstance(event, Completed | Failed | Closed):
            return
        with self._lock:
            joined = self._ends.take(rank, event)
            if joined.give_up:
                self._agent.abort(event.transfer_id)
                self._tell(Message(abort=rank_pb2.RankAbort(transfer_id=event.transfer_id)))
        if joined.end is not None:
            self._emit(joined.end)

    @contextlib.contextmanager
    def _noting_begin(self, request_id: int) -> Iterator[None]:
        before = self._own.transfer_of(request_id)
        yield
        transfer_id = self._own.transfer_of(request_id)
        if before is None and transfer_id is not None:
            self._ends.begin(transfer_id)


def step_message(pieces: Sequence[Piece]) -> Message:
    """What tells the ranks of a step."""
    return Message(step=step_to_wire(pieces))


def peers_message(peers: Iterable[worker_pb2.Peer]) -> Message:
    """What tells the ranks whom they may send to."""
    return Message(peers=worker_pb2.Peers(peers=peers))
