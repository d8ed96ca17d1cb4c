"""Owns what instances are told of the credits that they have given this router, and when.

How much it holds is the ledger's, what waits for room the queue's. While it has an instance to
itself, there is nothing to tell but that it has heard.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from twinpool.v1 import worker_pb2

from router.admission import Admission
from router.ledger import Capacity, InstanceKey, Ledger, Need
from router.membership import Credit, Member

# Between two looks at what has changed; longer where there are many instances to tell of it.
_LEAST_INTERVAL_S = 0.02
_INTERVAL_OF_ONE_S = 0.0005
# Of those that wait, the first ones speak for all: they want more than there is by themselves.
_MOST_WAITING = 256


@dataclass(frozen=True)
class _Large:
    """A request that finds no room anywhere, and the dp rank that is to make room for it."""

    need: Need
    key: InstanceKey
    dp_rank: int


class _Demand:
    """What waits for room, and how many blocks that is where they are of one kind."""

    def __init__(self, needs: Sequence[Need] = ()) -> None:
        self.needs = needs
        self._blocks: dict[tuple[int, int], int] = {}

    def blocks(self, capacity: Capacity) -> int:
        kind = (capacity.block_size, capacity.expected_output_tokens)
        if kind not in self._blocks:
            self._blocks[kind] = sum(capacity.blocks_at_first(need) for need in self.needs)
        return self._blocks[kind]


class CreditUses:
    """Says what is held and wanted of each shared instance, on change, but not too often."""

    def __init__(self, *, ledger: Ledger, admission: Admission) -> None:
        self._ledger = ledger
        self._admission = admission
        self._watched: dict[Member, Callable[[], None]] = {}
        self._told: dict[Member, worker_pb2.CreditUse] = {}
        self._demand = _Demand()
        self._is_stale = False
        self._large: _Large | None = None
        self._timer: asyncio.TimerHandle | None = None
        admission.on_change = self._look_later

    def watch(self, member: Member, tell: Callable[[], None]) -> None:
        """After a change of an instance's credit: from here on `tell` is called where it is due."""
        if member.credit is not None and member.credit.shared:
            self._watched[member] = tell
            self._look_later()
        else:
            self._watched.pop(member, None)

    def leave(self, member: Member) -> None:
        """Forgets an instance."""
        self._watched.pop(member, None)
        self._told.pop(member, None)

    def tell(self, member: Member) -> worker_pb2.CreditUse:
        """Returns what an instance is to be told this moment."""
        use = self._use(member)
        self._told[member] = use
        return use

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self) -> None:
        self._is_stale = True
        if self._watched and self._timer is None:
            interval_s = max(_LEAST_INTERVAL_S, _INTERVAL_OF_ONE_S * len(self._watched))
            self._timer = asyncio.get_running_loop().call_later(interval_s, self._look)

    def _look(self) -> None:
        self._timer = None
        for member, tell in self._watched.items():
            use, told = self._use(member), self._told.get(member)
            if told is None or _is_news(use, told, member.credit):
                tell()

    def _use(self, member: Member) -> worker_pb2.CreditUse:
        if self._is_stale:
            self._is_stale = False
            self._demand = _Demand(self._admission.waiting_for_decode(_MOST_WAITING))
            self._choose_large(self._demand.needs)
        # Alone it has everything already.
        demand = self._demand if member in self._watched else _Demand()
        credit, capacity = member.credit or Credit(), member.instance.capacity
        key = member.instance.key
        held, sequences = self._ledger.held(key)
        held = held or [0] * capacity.dp
        more = demand.blocks(capacity)
        largest = [0] * capacity.dp
        if demand.needs and self._large is not None and self._large.key == key:
            largest[self._large.dp_rank] = capacity.blocks_at_first(self._large.need)
        return worker_pb2.CreditUse(
            serial=credit.serial,
            held=held,
            wanted=[blocks + min(more, capacity.dp_blocks) for blocks in held],
            largest=largest,
            sequences_held=sequences,
            sequences_wanted=sequences + len(demand.needs),
        )

    def _choose_large(self, waiting: Sequence[Need]) -> None:
        """Chooses where the largest request that waits is to find room, if it finds none now.

        All instances are asked for more, but only one to make so much room for one request.
        """
        largest = max(waiting, key=lambda need: need.total_tokens, default=None)
        if largest is None or any(view.fits(largest) for view in self._ledger.decodes()):
            self._large = None
            return
        able: Mapping[InstanceKey, Capacity] = {
            member.instance.key: member.instance.capacity
            for member in self._watched
            if largest.total_tokens <= member.instance.capacity.largest_sequence
        }
        if self._large is not None and self._large.key in able:
            self._large = _Large(largest, self._large.key, self._large.dp_rank)
            return
        roomiest = next((view for view in self._ledger.decodes() if view.key in able), None)
        self._large = (
            _Large(largest, roomiest.key, roomiest.dp_rank) if roomiest is not None else None
        )


def _is_news(use: worker_pb2.CreditUse, told: worker_pb2.CreditUse, credit: Credit | None) -> bool:
    """Whether a change matters to others, or asks for more; the rest is told with heartbeats."""
    if use == told or credit is None:
        return False
    return credit.scarce or _asks(use, credit) or _asks(told, credit)


def _asks(use: worker_pb2.CreditUse, credit: Credit) -> bool:
    return use.sequences_wanted > credit.sequences or any(
        wanted > blocks for wanted, blocks in zip(use.wanted, credit.blocks, strict=True)
    )
