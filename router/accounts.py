"""Owns one instance's book: who was promised how much of it.

Decides nothing, and knows no other instance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from router.views import UNKNOWN_PACE, Capacity, Pace


@dataclass
class Account:
    """One instance's book: amounts (blocks or tokens) by request id, and their sum."""

    capacity: Capacity
    draining: bool = False
    suspended: bool = False
    # The next one is let in, and nobody after it.
    takes_one: bool = False
    pace: Pace = UNKNOWN_PACE
    total: int = 0
    entries: dict[int, int] = field(default_factory=dict)

    @property
    def takes_new(self) -> bool:
        return not self.draining and not self.suspended

    def enter(self, request_id: int, amount: int) -> None:
        self.entries[request_id] = amount
        self.total += amount
        self.suspended = self.suspended or self.takes_one
        self.takes_one = False

    def strike(self, request_id: int) -> None:
        self.total -= self.entries.pop(request_id)


@dataclass
class DecodeAccount(Account):
    """Amounts are blocks, of one dp rank each; `credit` is how many of each may be promised."""

    dp_rank_of: dict[int, int] = field(default_factory=dict)
    of_ranks: list[int] = field(default_factory=list)
    # Those that have taken more than was booked for them at first.
    outgrown: set[int] = field(default_factory=set)
    growing: list[int] = field(default_factory=list)  # how many of them each dp rank has
    credit: Sequence[int] = ()
    slots: int = 0

    def __post_init__(self) -> None:
        self.credit = [self.capacity.dp_blocks] * self.capacity.dp
        self.slots = self.capacity.max_sequences
        self.of_ranks = [0] * self.capacity.dp
        self.growing = [0] * self.capacity.dp

    def free(self, dp_rank: int) -> int:
        """Returns the blocks that a new sequence may take.

        One is left to each that grows: it will take it soon, and then it would be the new one that
        has to give its own back, with all that it was prefilled for.
        """
        return self.credit[dp_rank] - self.of_ranks[dp_rank] - self.growing[dp_rank]

    def grow(self, request_id: int, blocks: int) -> bool:
        """Returns whether that is more than was booked."""
        more = blocks - self.entries[request_id]
        if more <= 0:
            return False
        dp_rank = self.dp_rank_of[request_id]
        self.entries[request_id] = blocks
        self.total += more
        self.of_ranks[dp_rank] += more
        if request_id not in self.outgrown:
            self.outgrown.add(request_id)
            self.growing[dp_rank] += 1
        return True

    def take(self, request_id: int, blocks: int, dp_rank: int) -> None:
        self.enter(request_id, blocks)
        self.dp_rank_of[request_id] = dp_rank
        self.of_ranks[dp_rank] += blocks

    def strike(self, request_id: int) -> None:
        dp_rank = self.dp_rank_of.pop(request_id)
        self.of_ranks[dp_rank] -= self.entries[request_id]
        if request_id in self.outgrown:
            self.outgrown.remove(request_id)
            self.growing[dp_rank] -= 1
        super().strike(request_id)


@dataclass
class PrefillAccount(Account):
    """Amounts are tokens; each cp rank has a part of them."""

    shares: dict[int, list[int]] = field(default_factory=dict)
    of_ranks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.of_ranks = [0] * self.capacity.cp

    def owe(self, request_id: int, shares: list[int]) -> None:
        self.enter(request_id, sum(shares))
        self.shares[request_id] = shares
        self._add(shares, 1)

    def strike(self, request_id: int) -> None:
        super().strike(request_id)
        self._add(self.shares.pop(request_id), -1)

    def _add(self, shares: list[int], sign: int) -> None:
        pairs = zip(self.of_ranks, shares, strict=True)
        self.of_ranks = [total + sign * share for total, share in pairs]
