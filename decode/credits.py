"""How much of a decode instance each router may reserve: credits, which never add up to too much.

Owns what every router was granted and what it has said of it; knows no stream, no clock, and no
sequence. Amounts are of several resources: the blocks of each dp rank, and places for sequences.

A router reserves from its credit without asking, so that it may always have reserved as much as the
largest credit that it may still go by: what it was granted since the one that it acknowledged last,
that one, and what it held then. A credit is raised only by what is left when all routers have
reserved as much, so that it never takes anything from another that has not let go of it yet. A
credit may be lower than what its router holds, which then reserves nothing until it holds less:
what counts against the others is never less than what it holds.

Each has as much as it wants by max-min fairness, what it holds being part of that, and an equal
part of the rest. Where several want it all, a request larger than a fair share would never fit: its
router has a turn, in which the others get nothing new, and then not again before they have had
their share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Of the whole, in parts: where nobody lacks anything, a credit that is off by less stays as it is.
_SLACK = 8


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a router has reserved, would like to have in all, and its largest request that waits."""

    held: Sequence[int]
    wanted: Sequence[int]
    largest: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Grant:
    """A router's credit; `shared` and `scarce` are as in twinpool.v1.Credit."""

    serial: int
    amounts: tuple[int, ...]
    shared: bool = False
    scarce: bool = False


@dataclass
class _Account:
    """One router: the grants that it may go by, the latest one last, and what it has said."""

    grants: list[Grant]
    held: list[int]
    wanted: list[int]
    largest: list[int]

    @property
    def credit(self) -> tuple[int, ...]:
        return self.grants[-1].amounts

    def promised(self, k: int) -> int:
        """Most of a resource that it may reserve by what it was told."""
        return max(grant.amounts[k] for grant in self.grants)

    def assured(self, k: int) -> int:
        """How much of a resource it surely knows of."""
        return min(grant.amounts[k] for grant in self.grants)

    def bound(self, k: int) -> int:
        """Most of a resource that it may have reserved by now."""
        return max(self.held[k], self.promised(k))


@dataclass
class _Turns:
    """Whose large request others make room for, of one resource."""

    holder: int | None = None
    amount: int = 0  # what was asked for when the turn began
    waiting: dict[int, None] = field(default_factory=dict)
    rested: set[int] = field(default_factory=set)

    def forget(self, router: int) -> None:
        self.waiting.pop(router, None)
        self.rested.discard(router)
        if self.holder == router:
            self.holder = None


class Credits:
    """The credits of all routers of one instance. Routers are numbered by the caller.

    Args:
        totals: How much there is of each resource.
    """

    def __init__(self, totals: Sequence[int]) -> None:
        self._totals = tuple(totals)
        self._orphaned = [0] * len(totals)
        self._accounts: dict[int, _Account] = {}
        self._turns = [_Turns() for _ in totals]

    def join(self, router: int) -> None:
        """Take a router in; its credit is nothing at first."""
        nothing = [0] * len(self._totals)
        first = Grant(serial=0, amounts=tuple(nothing))
        self._accounts[router] = _Account([first], nothing[:], nothing[:], nothing[:])

    def leave(self, router: int, orphaned: Sequence[int]) -> None:
        """Forget a router that reserves nothing any more; `orphaned` is as in `set_orphaned`."""
        del self._accounts[router]
        for turns in self._turns:
            turns.forget(router)
        self.set_orphaned(orphaned)

    def set_orphaned(self, amounts: Sequence[int]) -> None:
        """Note what is still held by the requests of all routers that have left."""
        self._orphaned = [*amounts]

    def heard(self, router: int, serial: int, use: Use) -> None:
        """Take in what a router says of its credit.

        Raises:
            ValueError: It does not fit what it was granted.
        """
        account = self._accounts[router]
        amounts = (use.held, use.wanted, use.largest)
        if any(len(each) != len(self._totals) for each in amounts):
            raise ValueError(f"not of {len(self._totals)} resources")
        known = [grant for grant in account.grants if grant.serial >= serial]
        if not known or known[0].serial != serial:
            raise ValueError(f"serial {serial} is not of a credit that still counts")
        account.grants = known
        account.held = [*use.held]
        account.wanted = [*map(min, use.wanted, self._totals)]
        account.largest = [*map(min, use.largest, self._totals)]

    def grant_of(self, router: int) -> Grant:
        """A router's credit as it was granted last."""
        return self._accounts[router].grants[-1]

    def grant(self) -> dict[int, Grant]:
        """Grant what can be granted now; the routers whose credit has changed, and to what."""
        columns = [self._amounts(k) for k in range(len(self._totals))]
        lacking = {
            router
            for router, account in self._accounts.items()
            if any(column[router] < account.wanted[k] for k, column in enumerate(columns))
        }
        changed = {}
        for router, account in self._accounts.items():
            before = account.grants[-1]
            after = Grant(
                serial=before.serial + 1,
                amounts=tuple(column[router] for column in columns),
                shared=len(self._accounts) > 1,
                scarce=bool(lacking - {router}),
            )
            if (before.amounts, before.shared, before.scarce) != (
                after.amounts,
                after.shared,
                after.scarce,
            ):
                account.grants.append(after)
                changed[router] = after
        return changed

    # ---- one resource

    def _amounts(self, k: int) -> dict[int, int]:
        """Return what each router's credit of a resource is to be next."""
        targets, lacks = self._targets(k)
        now = {router: account.credit[k] for router, account in self._accounts.items()}
        slack = self._totals[k] // _SLACK if len(now) > 1 and not lacks else 0
        if all(abs(targets[router] - now[router]) <= slack for router in now):
            return now
        bounds = {router: account.bound(k) for router, account in self._accounts.items()}
        left = self._room(k) - sum(bounds.values())
        # Whoever is furthest from its due comes first: what is left may not do for all.
        for router in sorted(now, key=lambda router: (now[router] - targets[router], router)):
            # What it may have reserved already takes nothing from anybody, unless, having grown
            # by themselves, they hold more than there is.
            most = bounds[router] if left >= 0 else self._accounts[router].promised(k)
            more = min(max(0, left), max(0, targets[router] - most))
            left -= more
            now[router] = min(targets[router], most + more)
        return now

    def _room(self, k: int) -> int:
        return max(0, self._totals[k] - self._orphaned[k])

    def _targets(self, k: int) -> tuple[dict[int, int], bool]:
        """Return what each router's credit ought to be, and whether one is to get what it wants."""
        room = self._room(k)
        floors = dict.fromkeys(self._accounts, 0)
        wanted = {router: account.wanted[k] for router, account in self._accounts.items()}
        now = {router: account.credit[k] for router, account in self._accounts.items()}
        fair = fill(room, floors, wanted)
        due = {router: min(fair[router], wanted[router]) for router in fair}
        lacking = {r for r, account in self._accounts.items() if account.assured(k) < due[r]}
        holder = self._turn(k, fair, lacking)
        if holder is not None:
            account = self._accounts[holder]
            floors[holder] = min(room, account.held[k] + account.largest[k])
            fair = fill(room, floors, wanted)
            due[holder] = fair[holder]
        return fair, any(now[router] < due[router] for router in due)

    def _turn(self, k: int, fair: Mapping[int, int], lacking: set[int]) -> int | None:
        """Return the router that has its turn, if any has."""
        turns = self._turns[k]
        # A smaller one fits in time, when the others have come down to their share.
        share = self._room(k) // max(1, len(self._accounts))
        claims = [
            router
            for router, account in self._accounts.items()
            if account.largest[k] > max(share, fair[router])
        ]
        holder = turns.holder
        if holder is not None:
            account = self._accounts[holder]
            if holder in claims and account.held[k] < min(turns.amount, account.largest[k]):
                return holder
            turns.rested.add(holder)
            turns.holder = None
        turns.rested = {router for router in turns.rested if lacking - {router}}
        turns.waiting = dict.fromkeys(
            [router for router in turns.waiting if router in claims]
            + [router for router in claims if router not in turns.waiting]
        )
        turns.holder = next((r for r in turns.waiting if r not in turns.rested), None)
        if turns.holder is not None:
            del turns.waiting[turns.holder]
            turns.amount = self._accounts[turns.holder].largest[k]
        return turns.holder

    def check_integrity(self) -> None:
        """Raise where more is granted than there is."""
        for k, total in enumerate(self._totals):
            promised = sum(account.promised(k) for account in self._accounts.values())
            assert promised <= total, (k, promised, total)
            turns = self._turns[k]
            known = {turns.holder, *turns.waiting, *turns.rested} - {None}
            assert known <= self._accounts.keys(), (known, self._accounts.keys())
        for account in self._accounts.values():
            serials = [grant.serial for grant in account.grants]
            assert serials == [*range(serials[0], serials[0] + len(serials))], serials


def fill(room: int, floors: Mapping[int, int], wants: Mapping[int, int]) -> dict[int, int]:
    """Divide `room` wholly: floors, then wants by max-min fairness, then the rest in equal parts.

    Where not even the floors fit, they are divided alike.
    """
    if not floors:
        return {}
    if sum(floors.values()) > room:
        return _up_to(room, dict.fromkeys(floors, 0), floors)
    found = _up_to(room, floors, {key: max(floors[key], wants[key]) for key in floors})
    each, odd = divmod(room - sum(found.values()), len(found))
    return {key: found[key] + each + (place < odd) for place, key in enumerate(found)}


def _up_to(room: int, floors: Mapping[int, int], caps: Mapping[int, int]) -> dict[int, int]:
    """Return the fair parts between floors and caps; what nobody may have is left."""
    low, high = 0, max(caps.values())
    while low < high:
        level = (low + high + 1) // 2
        if sum(_at(level, floors, caps).values()) <= room:
            low = level
        else:
            high = level - 1
    found = _at(low, floors, caps)
    odd = room - sum(found.values())
    for key in sorted(key for key in found if floors[key] <= low < caps[key]):
        if odd > 0:
            found[key] += 1
            odd -= 1
    return found


def _at(level: int, floors: Mapping[int, int], caps: Mapping[int, int]) -> dict[int, int]:
    return {key: max(floors[key], min(level, caps[key])) for key in floors}
