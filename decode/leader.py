"""The first rank of a decode instance and the others: what they are told, and what they say.

All ranks of a dp rank do the same with the same sequences in the same order. When their parts in a
transfer end they tell, and one rank of each dp rank says which tokens were chosen.
"""

import asyncio
import threading
from collections.abc import Callable

from twinpool.v1 import rank_pb2

from decode.compute import Part, Rows
from decode.config import DecodeConfig
from decode.orders import Order, Placing
from decode.rank_wire import (
    part_from_wire,
    placing_to_wire,
    receive_to_wire,
    sequence_to_wire,
    step_to_wire,
)
from decode.sequence import SequenceRecord
from kvtransfer import Closed, Completed, Failed, ReceiveAgent, ReceiveGrant, TransferEvent
from service.ranks.joined import JoinedEnds
from service.ranks.leader import Followers, Message


class OtherRanks:
    """The ranks of an instance but its first, in its steps; see compute.Others.

    Args:
        take: Told (step, dp rank, part) when a dp rank has chosen its tokens.
    """

    def __init__(
        self,
        settings: DecodeConfig,
        followers: Followers,
        take: Callable[[int, int, Part], None],
    ) -> None:
        self._settings = settings
        self._followers = followers
        self._take = take
        self._ranks_of: dict[int, range] = {}

    def add(self, record: SequenceRecord) -> None:
        """See compute.Others."""
        ranks = self._ranks_of[record.request_id] = self._settings.dp_ranks(record.dp_rank)
        self._followers.tell(Message(sequence=sequence_to_wire(record)), ranks)

    def grow(self, request_id: int, block: int) -> None:
        """See compute.Others."""
        grow = rank_pb2.RankGrow(request_id=request_id, blocks=[block])
        self._followers.tell(Message(grow=grow), self._ranks_of[request_id])

    def remove(self, request_id: int) -> None:
        """See compute.Others."""
        ranks = self._ranks_of.pop(request_id, None)
        if ranks is not None:
            forget = rank_pb2.RankForget(request_id=request_id)
            self._followers.tell(Message(forget=forget), ranks)

    def step(self, number: int, rows: Rows, order: Order) -> None:
        """See compute.Others."""
        self._followers.tell(Message(decode=step_to_wire(number, rows, order)))

    def stage(self, placing: Placing) -> None:
        """Have the other ranks read what a placing brings them; see decode.balancer."""
        self._followers.tell(Message(placing=placing_to_wire(placing)))

    def sampled(self, rank: int, message: rank_pb2.RankSampled) -> None:
        """A rank says which tokens its dp rank has chosen."""
        dp_rank = rank // len(self._settings.dp_ranks(0))
        self._take(message.number, dp_rank, part_from_wire(message))


class GroupReceiver:
    """The receiving agents of an instance's ranks as one; see receiver.Receiver.

    `emit` is told of each transfer's end.

    A transfer ends when no rank has a part in it any more, and as one: what is kept of one that
    failed is what all of its ranks have.
    """

    def __init__(
        self,
        settings: DecodeConfig,
        own: ReceiveAgent,
        followers: Followers,
        emit: Callable[[TransferEvent], None],
    ) -> None:
        self._settings = settings
        self._own = own
        self._followers = followers
        self._emit = emit
        self._lock = threading.Lock()
        self._ends = JoinedEnds(len(settings.dp_ranks(0)))
        self._ranks_of: dict[int, range] = {}
        self._opening: dict[int, tuple[set[int], asyncio.Event]] = {}

    def ranks_of(self, dp_rank: int) -> range:
        """See Receiver."""
        return self._settings.dp_ranks(dp_rank)

    async def open(self, grant: ReceiveGrant, dp_rank: int) -> None:
        """See Receiver."""
        ranks = self.ranks_of(dp_rank)
        with self._lock:
            self._ends.begin(grant.transfer_id)
            self._ranks_of[grant.transfer_id] = ranks
        waiting = set(ranks) - {0}
        all_open = asyncio.Event()
        if waiting:
            self._opening[grant.transfer_id] = waiting, all_open
            self._followers.tell(Message(receive=receive_to_wire(grant)), ranks)
        if 0 in ranks:
            self._own.open(grant)
        if waiting:
            # A rank that does not answer is lost, and the instance with it.
            await all_open.wait()

    def opened(self, rank: int, transfer_id: int) -> None:
        """A rank will take a transfer; for the loop's thread."""
        waiting, all_open = self._opening[transfer_id]
        waiting.discard(rank)
        if not waiting:
            del self._opening[transfer_id]
            all_open.set()

    def revoke(self, transfer_id: int) -> None:
        """See Receiver."""
        with self._lock:
            ranks = self._ranks_of.get(transfer_id)
            if ranks is not None:
                self._give_up(transfer_id, ranks)

    def take(self, rank: int, event: TransferEvent) -> None:
        """A rank's agent has something to say; from any thread."""
        if not isinstance(event, Completed | Failed | Closed):
            return
        with self._lock:
            joined = self._ends.take(rank, event)
            if joined.give_up:
                self._give_up(event.transfer_id, self._ranks_of[event.transfer_id])
            if joined.end is not None:
                del self._ranks_of[event.transfer_id]
        if joined.end is not None:
            self._emit(joined.end)

    def _give_up(self, transfer_id: int, ranks: range) -> None:
        revoke = rank_pb2.RankRevoke(transfer_id=transfer_id)
        self._followers.tell(Message(revoke=revoke), ranks)
        if 0 in ranks:
            self._own.revoke(transfer_id)
