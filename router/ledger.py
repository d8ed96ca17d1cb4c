"""Owns the router's account of what each instance has promised to whom.

Decode instances promise blocks and batch slots, prefill instances owe prompt tokens. Where several
routers share a decode instance, this one's part of it is its credit. The ledger has no clock, does
no I/O and does not decide: `policy` picks a place, the ledger holds it.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

from router.accounts import Account, DecodeAccount, PrefillAccount
from router.kept_views import KeptViews
from router.views import (
    CachedTokens,
    Capacity,
    DecodeView,
    InstanceKey,
    Need,
    Pace,
    Placement,
    PrefillView,
    Promise,
    owed,
)

__all__ = [
    "CachedTokens",
    "Capacity",
    "DecodeView",
    "InstanceKey",
    "Ledger",
    "LedgerError",
    "Need",
    "Placement",
    "PrefillView",
]


class LedgerError(Exception):
    """The ledger was asked for something its own account rules out."""


class DecodeRoom(NamedTuple):
    """What several dp ranks have together; a place for a sequence is the whole instance's."""

    free_tokens: int
    tokens: int
    free_sequences: int
    sequences: int


class Amounts(NamedTuple):
    """What the instances that may be given work have together: decode's blocks, prefill's tokens.

    Those are free that no request holds, and those are owed that prefill has yet to compute.
    """

    free_blocks: int
    blocks: int
    owed_tokens: int


def _room_of(view: DecodeView) -> tuple[int, int, int, int]:
    """As in `DecodeRoom`."""
    capacity = view.capacity
    tokens = capacity.dp_blocks * capacity.block_size
    free_tokens = max(0, view.free_tokens)
    if view.dp_rank:
        return free_tokens, tokens, 0, 0
    places = capacity.max_sequences
    return free_tokens, tokens, places - view.sequences, places


class Ledger:
    """Reservations of all requests on all instances that may be given work."""

    def __init__(self, *, max_prefill_requests: int) -> None:
        self._max_prefill_requests = max_prefill_requests
        self._decodes: dict[InstanceKey, DecodeAccount] = {}
        self._prefills: dict[InstanceKey, PrefillAccount] = {}
        # Whether instances compute their own prompts: as the last that came, also once it has gone.
        self.is_colocated = False
        self._decode_of: dict[int, InstanceKey] = {}
        self._prefill_of: dict[int, InstanceKey] = {}
        self._decode_views = KeptViews(
            self._views_of_decode, attrgetter("load"), _room_of, len(DecodeRoom._fields)
        )
        self._prefill_views = KeptViews(self._views_of_prefill, attrgetter("load"))
        # What follows from which instances there are, until there are others.
        self._largest_prompt: int | None = None
        self._largest_request: int | None = None
        self._prefill_keys: tuple[InstanceKey, ...] | None = None

    # ---- instances

    def add_decode(self, key: InstanceKey, capacity: Capacity) -> None:
        self._check_new(key)
        self._decodes[key] = DecodeAccount(capacity)
        self.is_colocated = capacity.colocated
        self._forget_views()

    def add_prefill(self, key: InstanceKey, capacity: Capacity) -> None:
        self._check_new(key)
        self._prefills[key] = PrefillAccount(capacity)
        self.is_colocated = False
        self._forget_views()

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
        self._forget_views()

    def keys(self) -> AbstractSet[InstanceKey]:
        """All instances, those that get nothing new as well."""
        return self._decodes.keys() | self._prefills.keys()

    def set_draining(self, key: InstanceKey) -> None:
        """From here on the instance keeps what it has and gets nothing new."""
        for accounts in (self._decodes, self._prefills):
            if key in accounts:
                accounts[key].draining = True
        self._forget_views()

    def set_suspended(self, key: InstanceKey, suspended: bool, *, after_one: bool = False) -> None:
        """While suspended, the instance keeps what it has and gets nothing new.

        With `after_one` it is suspended once it has got one more request.
        """
        for accounts in (self._decodes, self._prefills):
            if key in accounts:
                accounts[key].suspended = suspended
                accounts[key].takes_one = after_one
        self._forget_views()

    def set_credit(self, key: InstanceKey, blocks: Sequence[int], sequences: int) -> bool:
        """From here on no more is promised of each dp rank, and no more sequences; what is, stays.

        Returns whether more may be promised than before. Does nothing where the instance is not in
        the ledger. Without it all of the capacity may be.
        """
        account = self._decodes.get(key)
        if account is None:
            return False
        if len(blocks) != account.capacity.dp:
            raise LedgerError(f"{key.name}: a credit for {len(blocks)} dp ranks, which it has not")
        before = (*account.credit, account.slots)
        account.credit, account.slots = blocks, sequences
        self._decode_views.changed(key)
        return any(map(int.__gt__, (*blocks, sequences), before))

    def held(self, key: InstanceKey) -> tuple[list[int], int]:
        """Blocks promised of each dp rank, those counted that are sure to be; and sequences."""
        account = self._decodes.get(key)
        if account is None:
            return [], 0
        growing = zip(account.of_ranks, account.growing, strict=True)
        return [blocks + more for blocks, more in growing], len(account.entries)

    def set_pace(self, key: InstanceKey, pace: Pace) -> None:
        """Takes note of an instance's speed; unknown keys are no error."""
        if key in self._decodes:
            self._decodes[key].pace = pace
            self._decode_views.changed(key)
        elif key in self._prefills:
            self._prefills[key].pace = pace
            self._prefill_views.changed(key)

    def _forget_views(self) -> None:
        self._decode_views.forget()
        self._prefill_views.forget()
        self._largest_prompt = self._largest_request = None
        self._prefill_keys = None

    # ---- views

    def decodes(self) -> list[DecodeView]:
        """The dp ranks that may be given work, the one with most room first."""
        return self._decode_views.of(self._decodes)

    def prefills(self) -> list[PrefillView]:
        """The instances that may be given work, the one that owes least first."""
        return self._prefill_views.of(self._prefills)

    def decode_room(self) -> DecodeRoom:
        """The room of all decode instances that may be given work."""
        return DecodeRoom(*self._decode_views.totals(self._decodes))

    def amounts(self) -> Amounts:
        """What there is now. Unlike the views it may be asked for by any thread."""
        decodes = [account for account in list(self._decodes.values()) if account.takes_new]
        prefills = [account for account in list(self._prefills.values()) if account.takes_new]
        return Amounts(
            free_blocks=sum(
                account.free(rank) for account in decodes for rank in range(account.capacity.dp)
            ),
            blocks=sum(account.capacity.dp_blocks * account.capacity.dp for account in decodes),
            owed_tokens=sum(account.total for account in prefills),
        )

    def prefill_keys(self) -> tuple[InstanceKey, ...]:
        """The prefill instances that may be given work; the same object until there are others."""
        if self._prefill_keys is None:
            self._prefill_keys = tuple(view.key for view in self.prefills())
        return self._prefill_keys

    def _views_of_decode(self, key: InstanceKey) -> list[DecodeView]:
        account = self._decodes[key]
        return [
            DecodeView(
                key=key,
                capacity=account.capacity,
                free_blocks=account.free(dp_rank),
                sequences=len(account.entries),
                dp_rank=dp_rank,
                slots=account.slots,
                pace=account.pace,
            )
            for dp_rank in range(account.capacity.dp)
            if account.takes_new
        ]

    def _views_of_prefill(self, key: InstanceKey) -> list[PrefillView]:
        account = self._prefills[key]
        view = PrefillView(
            key=key,
            capacity=account.capacity,
            owed_tokens=tuple(account.of_ranks),
            outstanding_requests=len(account.entries),
            max_outstanding_requests=self._max_prefill_requests,
            pace=account.pace,
        )
        return [view] if account.takes_new else []

    def promises(self) -> dict[InstanceKey, Promise]:
        """What may be booked at the instances whose sequences may come to more than was booked."""
        return {
            key: Promise(capacity=account.capacity, blocks=tuple(account.credit))
            for key, account in list(self._decodes.items())
            if account.capacity.expected_output_tokens
        }

    def reserved_blocks(self, key: InstanceKey) -> int:
        return self._decodes[key].total if key in self._decodes else 0

    def largest_request_tokens(self) -> int:
        """The largest prompt + max_new_tokens that some decode instance could ever hold."""
        if self._largest_request is None:
            self._largest_request = _largest(self._decodes)
        return self._largest_request

    def largest_prompt_tokens(self) -> int:
        """The longest prompt that some instance that computes prompts could ever hold."""
        if self.is_colocated:
            return self.largest_request_tokens()
        if self._largest_prompt is None:
            self._largest_prompt = _largest(self._prefills)
        return self._largest_prompt

    def fits_ever(self, need: Need) -> bool:
        """Whether the instances of now could hold the request if they were empty."""
        if need.prompt_tokens > self.largest_prompt_tokens():
            return False
        return not need.decodes or need.total_tokens <= self.largest_request_tokens()

    def asked(self, need: Need) -> Need:
        """Returns a need as the instances of now have it."""
        if need.colocated is self.is_colocated:
            return need
        return replace(need, colocated=self.is_colocated)

    # ---- reservations

    def try_reserve(self, request_id: int, need: Need, placement: Placement) -> bool:
        """Books the whole placement or nothing; a request id can be booked once."""
        if request_id in self._prefill_of or request_id in self._decode_of:
            raise LedgerError(f"request {request_id:016x} has a reservation already")
        if placement.prefill is None:
            return placement.decode is not None and self._reserve_blocks(
                request_id, need, placement.decode, placement.dp_rank
            )
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
        prefill.owe(request_id, owed(prefill.capacity, need.prompt_tokens, cached, first))
        self._prefill_of[request_id] = placement.prefill
        self._note_changed(self._prefill_views, placement.prefill, prefill)
        return True

    def _reserve_blocks(self, request_id: int, need: Need, key: InstanceKey, dp_rank: int) -> bool:
        account = self._decodes.get(key)
        if account is None or not account.takes_new:
            return False
        blocks = account.capacity.blocks_at_first(need)
        if (
            need.total_tokens > account.capacity.largest_sequence
            or len(account.entries) >= account.slots
            or blocks > account.free(dp_rank)
        ):
            return False
        account.take(request_id, blocks, dp_rank)
        self._decode_of[request_id] = key
        self._note_changed(self._decode_views, key, account)
        return True

    def _note_changed(
        self,
        views: KeptViews[InstanceKey, DecodeView] | KeptViews[InstanceKey, PrefillView],
        key: InstanceKey,
        account: Account,
    ) -> None:
        if account.takes_new:
            views.changed(key)
        else:  # that was the one that it took
            views.forget()

    def grow(self, request_id: int, tokens: int) -> bool:
        """Books what decode has taken for a sequence that has come to so many tokens.

        It may be more than there is, since blocks that sequences share are booked for each. Does
        nothing where decode reserves all at first. Returns whether that is the first time that the
        sequence has come to more than was booked.
        """
        key = self._decode_of.get(request_id)
        if key is None:
            return False
        account = self._decodes[key]
        overcommits = account.capacity.expected_output_tokens > 0
        has_outgrown = request_id in account.outgrown
        if overcommits and account.grow(request_id, account.capacity.blocks_for(tokens)):
            self._decode_views.changed(key)
        return not has_outgrown and request_id in account.outgrown

    def end_prefill(self, request_id: int) -> bool:
        """Prefill owes this request nothing any more; returns whether it did until now."""
        key = self._prefill_of.pop(request_id, None)
        if key is None:
            return False
        self._prefills[key].strike(request_id)
        self._prefill_views.changed(key)
        return True

    def release(self, request_id: int) -> bool:
        """Frees all that the request still holds; returns whether it held anything."""
        was_owed = self.end_prefill(request_id)
        key = self._decode_of.pop(request_id, None)
        if key is None:
            return was_owed
        self._decodes[key].strike(request_id)
        self._decode_views.changed(key)
        return True

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
        """Raises LedgerError where the sums, limits, indexes or kept views do not agree."""
        if not (
            self._decode_views.are_true(self._decodes)
            and self._prefill_views.are_true(self._prefills)
        ):
            raise LedgerError("a view that was kept is not that of its account")
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
            growing = [0] * capacity.dp
            for request_id in account.outgrown & account.dp_rank_of.keys():
                growing[account.dp_rank_of[request_id]] += 1
            if growing != account.growing:
                raise LedgerError(f"{key.name}: {account.growing} are said to grow")
            overcommits = bool(capacity.expected_output_tokens)
            if not account.outgrown <= (account.entries.keys() if overcommits else set()):
                raise LedgerError(f"{key.name}: what has grown is not there, or must not grow")
            if len(account.entries) > capacity.max_sequences or (
                max(of_ranks) > capacity.dp_blocks and not overcommits
            ):
                raise LedgerError(f"{key.name}: more is promised than it has")


def _largest(accounts: Mapping[InstanceKey, Account]) -> int:
    """The longest sequence of instances that take new requests, or will again."""
    staying = (account for account in accounts.values() if not account.draining)
    return max((account.capacity.largest_sequence for account in staying), default=0)
