"""Owns the router's account of what each instance has promised to whom.

Decode instances promise blocks and batch slots, prefill instances owe prompt tokens. The ledger
has no clock, does no I/O and does not decide: `policy` picks a place, the ledger holds it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class LedgerError(Exception):
    """The ledger was asked for something its own account rules out."""


class InstanceKey(NamedTuple):
    """One life of one instance: after a restart the name is the same and the epoch is higher."""

    name: str
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What an instance said it can hold. A block is a grain of tokens on each of `cp` ranks.

    Each of `dp` ranks has as many of the blocks, and a sequence is on one of them. Decode reserves
    room for `expected_output_tokens` at first, and takes more when needed; 0: for all there may be.
    """

    blocks: int
    block_size: int
    max_sequences: int
    max_sequence_tokens: int
    cp: int = 1
    dp: int = 1
    expected_output_tokens: int = 0

    @property
    def dp_blocks(self) -> int:
        """Blocks of each dp rank."""
        return self.blocks // self.dp

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def blocks_at_first(self, need: "Need") -> int:
        """Returns what decode reserves for a request; what was generated before is prompt."""
        new = need.max_new_tokens
        if self.expected_output_tokens:
            new = min(new, self.expected_output_tokens)
        return self.blocks_for(need.prompt_tokens + new)

    @property
    def largest_sequence(self) -> int:
        """Tokens of the longest sequence that an otherwise empty instance can hold."""
        return min(self.max_sequence_tokens, self.dp_blocks * self.block_size)

    def shares(self, tokens: int, first: int) -> list[int]:
        """Returns how many of a sequence's first tokens each cp rank has.

        They are dealt grain by grain, from rank `first` on, in every second block backwards.
        """
        grain = self.block_size // self.cp
        blocks, rest = divmod(tokens, self.block_size)
        shares = [blocks * grain] * self.cp
        for turn in range(self.cp):
            place = self.cp - 1 - turn if blocks % 2 else turn
            shares[(first + place) % self.cp] += max(0, min(grain, rest - turn * grain))
        return shares


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one request asks of the pools, in tokens."""

    prompt_tokens: int
    max_new_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.max_new_tokens

    @property
    def decodes(self) -> bool:
        """Whether a decode instance takes part; the first token comes from prefill alone."""
        return self.max_new_tokens > 1


class CachedTokens(Protocol):
    """How many tokens of a request's prompt an instance is thought to have in its prefix cache."""

    def __call__(self, key: InstanceKey, dp_rank: int = 0) -> int:
        """Return those of an instance, and of one of its dp ranks."""
        ...


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a request goes. `decode` is None where prefill alone answers it.

    `cached_tokens` of its prompt are thought to be at prefill already, which does not owe them.
    `cp_first` is the cp rank that is to have its first tokens, None where load is not to say, and
    `dp_rank` decode's dp rank.
    """

    prefill: InstanceKey
    decode: InstanceKey | None
    cached_tokens: int = 0
    cp_first: int | None = None
    dp_rank: int = 0


@dataclass(frozen=True, kw_only=True)
class DecodeView:
    """A dp rank of a decode instance as a policy sees it; `sequences` are all of the instance's."""

    key: InstanceKey
    capacity: Capacity
    free_blocks: int
    sequences: int
    dp_rank: int = 0

    def fits(self, need: Need) -> bool:
        return (
            need.total_tokens <= self.capacity.largest_sequence
            and self.sequences < self.capacity.max_sequences
            and self.capacity.blocks_at_first(need) <= self.free_blocks
        )

    def room(self, cached_tokens: int) -> int:
        """Returns how many tokens are free, those of a prompt counted that need not be sent."""
        return self.free_blocks * self.capacity.block_size + cached_tokens


@dataclass(frozen=True, kw_only=True)
class PrefillView:
    """A prefill instance as a policy sees it; `owed_tokens` are those of each of its cp ranks."""

    key: InstanceKey
    capacity: Capacity
    owed_tokens: tuple[int, ...]
    outstanding_requests: int
    max_outstanding_requests: int

    def fits(self, need: Need) -> bool:
        return need.prompt_tokens <= self.capacity.largest_sequence and not self.is_full

    @property
    def is_full(self) -> bool:
        """Whether it takes no more requests, of whatever size, before it is done with one."""
        return self.outstanding_requests >= self.max_outstanding_requests

    @property
    def outstanding_tokens(self) -> int:
        """Prompt tokens that it has yet to compute."""
        return sum(self.owed_tokens)

    def tokens_until(self, prompt_tokens: int, cached_tokens: int, first: int) -> int:
        """Returns how many tokens the busiest of the ranks that a prompt needs computes first.

        The prompt's own are among them.
        """
        shares = _owed(self.capacity, prompt_tokens, cached_tokens, first)
        queued = zip(self.owed_tokens, shares, strict=True)
        return max((before + own for before, own in queued if own), default=0)


@dataclass
class _Account:
    """One instance's book: amounts (blocks or tokens) by request id, and their sum."""

    capacity: Capacity
    draining: bool = False
    suspended: bool = False
    total: int = 0
    entries: dict[int, int] = field(default_factory=dict)

    @property
    def takes_new(self) -> bool:
        return not self.draining and not self.suspended

    def enter(self, request_id: int, amount: int) -> None:
        self.entries[request_id] = amount
        self.total += amount

    def strike(self, request_id: int) -> None:
        self.total -= self.entries.pop(request_id)


@dataclass
class _DecodeAccount(_Account):
    """Amounts are blocks, of one dp rank each."""

    dp_rank_of: dict[int, int] = field(default_factory=dict)
    of_ranks: list[int] = field(default_factory=list)
    # Those that have taken more than was booked for them at first.
    outgrown: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.of_ranks = [0] * self.capacity.dp

    def free(self, dp_rank: int) -> int:
        """Returns the blocks that a new sequence may take.

        One is left to each that grows: it will take it soon, and then it would be the new one that
        has to give its own back, with all that it was prefilled for.
        """
        growing = sum(self.dp_rank_of[request_id] == dp_rank for request_id in self.outgrown)
        return self.capacity.dp_blocks - self.of_ranks[dp_rank] - growing

    def grow(self, request_id: int, blocks: int) -> None:
        more = blocks - self.entries[request_id]
        if more > 0:
            self.entries[request_id] = blocks
            self.total += more
            self.of_ranks[self.dp_rank_of[request_id]] += more
            self.outgrown.add(request_id)

    def take(self, request_id: int, blocks: int, dp_rank: int) -> None:
        self.enter(request_id, blocks)
        self.dp_rank_of[request_id] = dp_rank
        self.of_ranks[dp_rank] += blocks

    def strike(self, request_id: int) -> None:
        self.of_ranks[self.dp_rank_of.pop(request_id)] -= self.entries[request_id]
        self.outgrown.discard(request_id)
        super().strike(request_id)


@dataclass
class _PrefillAccount(_Account):
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


def _owed(capacity: Capacity, prompt_tokens: int, cached_tokens: int, first: int) -> list[int]:
    """Returns what each cp rank has to compute of a prompt."""
    cached = capacity.shares(min(cached_tokens, prompt_tokens), first)
    whole = capacity.shares(prompt_tokens, first)
    return [all_of_it - known for all_of_it, known in zip(whole, cached, strict=True)]


class Ledger:
    """Reservations of all requests on all instances that may be given work."""

    def __init__(self, *, max_prefill_requests: int) -> None:
        self._max_prefill_requests = max_prefill_requests
        self._decodes: dict[InstanceKey, _DecodeAccount] = {}
        self._prefills: dict[InstanceKey, _PrefillAccount] = {}
        self._decode_of: dict[int, InstanceKey] = {}
        self._prefill_of: dict[int, InstanceKey] = {}

    # ---- instances

    def add_decode(self, key: InstanceKey, capacity: Capacity) -> None:
        self._check_new(key)
        self._decodes[key] = _DecodeAccount(capacity)

    def add_prefill(self, key: InstanceKey, capacity: Capacity) -> None:
        self._check_new(key)
        self._prefills[key] = _PrefillAccount(capacity)

    def _check_new(self, key: InstanceKey) -> None:
        if key in self._decodes or key in self._prefills:
            raise LedgerError(f"instance {key.name} epoch {key.epoch} is in the ledger already")

    def remove(self, key: InstanceKey) -> None:
        """Forgets an instance and every reservation on it; unknown keys are no error."""
        for accounts, places in (
            (self._decodes, self._decode_of),
            (self._prefills, self._prefill_of),
        ):
            account = accounts.pop(key, None)
            for request_id in account.entries if account is not None else ():
                del places[request_id]

    def set_draining(self, key: InstanceKey) -> None:
        """From here on the instance keeps what it has and gets nothing new."""
        for accounts in (self._decodes, self._prefills):
            if key in accounts:
                accounts[key].draining = True

    def set_suspended(self, key: InstanceKey, suspended: bool) -> None:
        """While suspended, the instance keeps what it has and gets nothing new."""
        for accounts in (self._decodes, self._prefills):
            if key in accounts:
                accounts[key].suspended = suspended

    # ---- views

    def decodes(self) -> list[DecodeView]:
        return [
            DecodeView(
                key=key,
                capacity=account.capacity,
                free_blocks=account.free(dp_rank),
                sequences=len(account.entries),
                dp_rank=dp_rank,
            )
            for key, account in self._decodes.items()
            if account.takes_new
            for dp_rank in range(account.capacity.dp)
        ]

    def prefills(self) -> list[PrefillView]:
        return [
            PrefillView(
                key=key,
                capacity=account.capacity,
                owed_tokens=tuple(account.of_ranks),
                outstanding_requests=len(account.entries),
                max_outstanding_requests=self._max_prefill_requests,
            )
            for key, account in self._prefills.items()
            if account.takes_new
        ]

    def reserved_blocks(self, key: InstanceKey) -> int:
        return self._decodes[key].total if key in self._decodes else 0

    def largest_request_tokens(self) -> int:
        """The largest prompt + max_new_tokens that some decode instance could ever hold."""
        return _largest(self._decodes)

    def largest_prompt_tokens(self) -> int:
        """The longest prompt that some prefill instance could ever hold."""
        return _largest(self._prefills)

    def fits_ever(self, need: Need) -> bool:
        """Whether the instances of now could hold the request if they were empty."""
        if need.prompt_tokens > self.largest_prompt_tokens():
            return False
        return not need.decodes or need.total_tokens <= self.largest_request_tokens()

    # ---- reservations

    def try_reserve(self, request_id: int, need: Need, placement: Placement) -> bool:
        """Books the whole placement or nothing; a request id can be booked once."""
        if request_id in self._prefill_of or request_id in self._decode_of:
            raise LedgerError(f"request {request_id:016x} has a reservation already")
        prefill = self._prefills.get(placement.prefill)
        if prefill is None or not prefill.takes_new:
            return False
        if len(prefill.entries) >= self._max_prefill_requests:
            return False
        if placement.decode is not None and not self._reserve_blocks(
            request_id, need, placement.decode, placement.dp_rank
        ):
            return False
        cached, first = placement.cached_tokens, placement.cp_first or 0
        prefill.owe(request_id, _owed(prefill.capacity, need.prompt_tokens, cached, first))
        self._prefill_of[request_id] = placement.prefill
        return True

    def _reserve_blocks(self, request_id: int, need: Need, key: InstanceKey, dp_rank: int) -> bool:
        account = self._decodes.get(key)
        if account is None or not account.takes_new:
            return False
        blocks = account.capacity.blocks_at_first(need)
        if (
            need.total_tokens > account.capacity.largest_sequence
            or len(account.entries) >= account.capacity.max_sequences
            or blocks > account.free(dp_rank)
        ):
            return False
        account.take(request_id, blocks, dp_rank)
        self._decode_of[request_id] = key
        return True

    def grow(self, request_id: int, tokens: int) -> None:
        """Books what decode has taken for a sequence that has come to so many tokens.

        It may be more than there is, since blocks that sequences share are booked for each. Does
        nothing where decode reserves all at first.
        """
        key = self._decode_of.get(request_id)
        if key is not None and (account := self._decodes[key]).capacity.expected_output_tokens:
            account.grow(request_id, account.capacity.blocks_for(tokens))

    def end_prefill(self, request_id: int) -> None:
        """Prefill owes this request nothing any more; no error where it never did."""
        key = self._prefill_of.pop(request_id, None)
        if key is not None:
            self._prefills[key].strike(request_id)

    def release(self, request_id: int) -> None:
        """Frees all that the request still holds; calling it again changes nothing."""
        self.end_prefill(request_id)
        key = self._decode_of.pop(request_id, None)
        if key is not None:
            self._decodes[key].strike(request_id)

    def room_of(self, request_id: int) -> int | None:
        """Tokens of room that a request has at decode: 0 while only prefill has it, else None."""
        key = self._decode_of.get(request_id)
        if key is not None:
            account = self._decodes[key]
            return account.entries[request_id] * account.capacity.block_size
        return 0 if request_id in self._prefill_of else None

    def is_idle(self) -> bool:
        return not self._decode_of and not self._prefill_of

    def check_integrity(self) -> None:
        """Raises LedgerError where the sums, limits or indexes do not agree."""
        for accounts, places in (
            (self._decodes, self._decode_of),
            (self._prefills, self._prefill_of),
        ):
            held = {r: key for key, account in accounts.items() for r in account.entries}
            if held != places:
                raise LedgerError("the requests of the accounts and of the index differ")
            for key, account in accounts.items():
                if account.total != sum(account.entries.values()):
                    raise LedgerError(f"{key.name}: the sum is {account.total}, entries differ")
        for key, owing in self._prefills.items():
            if {r: sum(shares) for r, shares in owing.shares.items()} != owing.entries or (
                owing.of_ranks != list(map(sum, zip(*owing.shares.values(), strict=True)))
                and any(owing.of_ranks)
            ):
                raise LedgerError(f"{key.name}: the ranks' sums are {owing.of_ranks}")
        for key, account in self._decodes.items():
            capacity = account.capacity
            of_ranks = [0] * capacity.dp
            for request_id, dp_rank in account.dp_rank_of.items():
                of_ranks[dp_rank] += account.entries[request_id]
            if of_ranks != account.of_ranks:
                raise LedgerError(f"{key.name}: the dp ranks' sums are {account.of_ranks}")
            overcommits = bool(capacity.expected_output_tokens)
            if not account.outgrown <= (account.entries.keys() if overcommits else set()):
                raise LedgerError(f"{key.name}: what has grown is not there, or must not grow")
            if len(account.entries) > capacity.max_sequences or (
                max(of_ranks) > capacity.dp_blocks and not overcommits
            ):
                raise LedgerError(f"{key.name}: more is promised than it has")


def _largest(accounts: Mapping[InstanceKey, _Account]) -> int:
    """The longest sequence of instances that take new requests, or will again."""
    staying = (account for account in accounts.values() if not account.draining)
    return max((account.capacity.largest_sequence for account in staying), default=0)
