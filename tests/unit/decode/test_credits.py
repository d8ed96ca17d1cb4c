"""Credits: never more than there is, nothing lost, and a fair part for whoever wants it."""

from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from decode.credits import Credits, Grant, Use, fill

AMOUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=5)


def use(held: int, wanted: int = 0, largest: int = 0) -> Use:
    return Use(held=[held], wanted=[max(held, wanted)], largest=[largest])


class Talk:
    """Credits of one resource, and routers that answer at once."""

    def __init__(self, total: int, routers: int) -> None:
        self.credits = Credits([total])
        self.uses: dict[int, Use] = {}
        self.booking: set[int] = set()
        for router in range(routers):
            self.credits.join(router)
            self.say(router, 0)

    def say(
        self, router: int, held: int, wanted: int = 0, largest: int = 0, *, books: bool = False
    ) -> None:
        """With `books` it reserves as much as it wants and may."""
        self.uses[router] = use(held, wanted, largest)
        self.booking.discard(router)
        self.booking |= {router} if books else set()
        self._heard(router)
        self.settle()

    def settle(self) -> None:
        while changed := self.credits.grant():
            self.credits.check_integrity()
            for router in changed:
                self._heard(router)

    def _heard(self, router: int) -> None:
        serial = self.credits.grant_of(router).serial
        if router in self.booking:
            [held], [wanted] = self.uses[router].held, self.uses[router].wanted
            self.uses[router] = use(max(held, min(wanted, self.of(router))), wanted)
        self.credits.heard(router, serial, self.uses[router])

    def leave(self, router: int, orphaned: int = 0) -> None:
        del self.uses[router]
        self.credits.leave(router, [orphaned])
        self.settle()

    def of(self, router: int) -> int:
        [amount] = self.credits.grant_of(router).amounts
        return amount

    @property
    def all(self) -> list[int]:
        return [self.of(router) for router in self.uses]


def test_one_router_alone_has_everything() -> None:
    talk = Talk(100, routers=1)
    assert talk.all == [100]
    assert not talk.credits.grant_of(0).shared


def test_routers_that_want_nothing_share_alike() -> None:
    assert Talk(100, routers=2).all == [50, 50]
    assert sorted(Talk(100, routers=3).all) == [33, 33, 34]


def test_one_that_wants_more_than_its_part_gets_what_others_do_not_use() -> None:
    talk = Talk(100, routers=2)
    talk.say(0, held=50, wanted=90)
    assert talk.of(0) >= 90
    talk.say(1, held=5, wanted=5)
    assert talk.of(0) >= 90


def test_what_is_not_used_flows_back() -> None:
    talk = Talk(100, routers=2)
    talk.say(0, held=50, wanted=100)
    assert talk.all == [100, 0]
    talk.say(0, held=0)
    assert talk.all == [50, 50]


def test_two_that_want_everything_get_half_each_as_it_comes_back() -> None:
    talk = Talk(100, routers=2)
    talk.say(0, held=50, wanted=100)
    talk.say(0, held=100, wanted=100)
    talk.say(1, held=0, wanted=100)
    assert talk.all == [50, 0]
    assert talk.credits.grant_of(0).scarce
    talk.say(0, held=70, wanted=100)
    assert talk.all == [50, 30]
    talk.say(0, held=20, wanted=100)
    assert talk.all == [50, 50]


def test_smaller_credit_frees_nothing_before_it_is_acknowledged() -> None:
    credits = Credits([100])
    credits.join(0)
    assert credits.grant()[0].amounts == (100,)
    credits.heard(0, 1, use(0))
    credits.join(1)
    assert credits.grant()[0].amounts == (50,)
    assert credits.grant_of(1).amounts == (0,)
    # It had reserved from the larger one meanwhile.
    credits.heard(0, 1, use(60))
    assert credits.grant()[0].amounts == (80,)
    assert credits.grant_of(1).amounts == (0,)
    credits.heard(0, credits.grant_of(0).serial, use(60))
    assert credits.grant()[1].amounts == (20,)
    credits.check_integrity()


def test_credit_of_a_lost_router_comes_back_as_what_it_held_is_released() -> None:
    talk = Talk(100, routers=2)
    talk.say(0, held=40, wanted=40)
    talk.leave(0, orphaned=40)
    assert talk.of(1) == 60
    talk.credits.set_orphaned([0])
    talk.settle()
    assert talk.of(1) == 100


def test_request_larger_than_a_fair_share_gets_its_room_in_turn() -> None:
    talk = Talk(100, routers=2)
    talk.say(0, held=50, wanted=50)
    talk.say(1, held=50, wanted=100)
    talk.say(0, held=50, wanted=100, largest=80)
    talk.say(1, held=0, wanted=100)
    assert talk.of(1) == 0
    talk.say(1, held=0, wanted=100, books=True)
    talk.say(0, held=0, wanted=100, largest=80)
    assert talk.of(0) >= 80
    # It is served; the next large one waits until the other has had its part.
    talk.say(0, held=80, wanted=100, largest=90)
    assert talk.of(1) == 20
    talk.say(0, held=0, wanted=100, largest=90)
    assert talk.of(0) == 50
    talk.say(1, held=0)
    assert talk.of(0) >= 90


def test_two_large_requests_take_turns() -> None:
    talk = Talk(100, routers=2)
    for router in (0, 1):
        talk.say(router, held=0, wanted=80, largest=80)
    assert talk.of(0) >= 80
    talk.say(0, held=80, wanted=100, largest=80)
    talk.say(0, held=0, wanted=80, largest=80)
    assert talk.of(1) >= 80


@pytest.mark.parametrize(
    ("serial", "said"), [(7, use(0)), (1, Use(held=[0, 0], wanted=[0, 0], largest=[0, 0]))]
)
def test_answer_that_fits_no_credit_is_refused(serial: int, said: Use) -> None:
    credits = Credits([10])
    credits.join(0)
    credits.grant()
    with pytest.raises(ValueError, match=r"serial|resources"):
        credits.heard(0, serial, said)


def test_blocks_that_grew_beyond_a_credit_are_never_given_out_twice() -> None:
    talk = Talk(100, routers=2)
    talk.say(0, held=70, wanted=100)
    talk.say(1, held=60, wanted=100)
    talk.credits.check_integrity()
    assert sum(talk.all) <= 100
    talk.say(0, held=10, wanted=10)
    assert talk.of(1) >= 60


@settings(deadline=None)
@given(room=st.integers(0, 200), floors=AMOUNTS, data=st.data())
def test_division_is_whole_and_nobody_lacks_while_another_has_more(
    room: int, floors: list[int], data: st.DataObject
) -> None:
    wants = data.draw(st.lists(st.integers(0, 80), min_size=len(floors), max_size=len(floors)))
    found = fill(room, dict(enumerate(floors)), dict(enumerate(wants)))
    assert sum(found.values()) == room
    for i, mine in found.items():
        if sum(floors) <= room:
            assert mine >= floors[i]
            if mine < wants[i]:
                assert all(other <= max(mine + 1, floors[j]) for j, other in found.items())


class Router:
    """A router behind two ordered, slow streams."""

    def __init__(self, resources: int) -> None:
        self.to_router: deque[Grant] = deque()
        self.to_instance: deque[tuple[int, Use]] = deque()
        self.serial = 0
        self.credit = [0] * resources
        self.held = [0] * resources
        self.queued = [0] * resources

    def say(self) -> None:
        wanted = [held + queued for held, queued in zip(self.held, self.queued, strict=True)]
        largest = list(self.queued)
        self.to_instance.append(
            (self.serial, Use(held=list(self.held), wanted=wanted, largest=largest))
        )

    def take(self, grant: Grant) -> None:
        self.serial, self.credit = grant.serial, list(grant.amounts)
        self.say()

    def book(self) -> None:
        for k, amount in enumerate(self.queued):
            if self.held[k] + amount <= self.credit[k]:
                self.held[k] += amount
                self.queued[k] = 0


TOTALS = (12, 5)
NUMBERS = st.integers(0, 3)


class CreditsMachine(RuleBasedStateMachine):
    """Routers come and go, reserve from what they were told, and hear of it late."""

    @initialize()
    def begin(self) -> None:
        self.credits = Credits(TOTALS)
        self.routers: dict[int, Router] = {}
        self.orphaned: list[Sequence[int]] = []
        self.next = 0

    @precondition(lambda self: len(self.routers) < 4)
    @rule()
    def join(self) -> None:
        self.routers[self.next] = Router(len(TOTALS))
        self.credits.join(self.next)
        self.next += 1
        self.deal()

    @precondition(lambda self: self.routers)
    @rule(pick=NUMBERS)
    def die(self, pick: int) -> None:
        number = self.number(pick)
        self.orphaned.append(self.routers.pop(number).held)
        self.credits.leave(number, self.held_by_lost())
        self.deal()

    @precondition(lambda self: self.orphaned)
    @rule()
    def release_of_lost(self) -> None:
        self.orphaned.pop()
        self.credits.set_orphaned(self.held_by_lost())
        self.deal()

    @precondition(lambda self: self.routers)
    @rule(pick=NUMBERS, k=st.integers(0, 1), amount=st.integers(1, 12))
    def request(self, pick: int, k: int, amount: int) -> None:
        router = self.routers[self.number(pick)]
        router.queued[k] = min(amount, TOTALS[k])
        router.book()
        router.say()

    @precondition(lambda self: self.routers)
    @rule(pick=NUMBERS, k=st.integers(0, 1), amount=st.integers(1, 12), tells=st.booleans())
    def release(self, pick: int, k: int, amount: int, tells: bool) -> None:
        router = self.routers[self.number(pick)]
        router.held[k] -= min(amount, router.held[k])
        router.book()
        if tells:
            router.say()

    @precondition(lambda self: self.routers)
    @rule(pick=NUMBERS)
    def hear_credit(self, pick: int) -> None:
        router = self.routers[self.number(pick)]
        if router.to_router:
            router.take(router.to_router.popleft())
            router.book()

    @precondition(lambda self: self.routers)
    @rule(pick=NUMBERS)
    def hear_use(self, pick: int) -> None:
        number = self.number(pick)
        if self.routers[number].to_instance:
            self.credits.heard(number, *self.routers[number].to_instance.popleft())
            self.deal()

    def number(self, pick: int) -> int:
        return [*self.routers][pick % len(self.routers)]

    def held_by_lost(self) -> list[int]:
        return [sum(column) for column in zip([0] * len(TOTALS), *self.orphaned, strict=True)]

    def deal(self) -> None:
        for number, grant in self.credits.grant().items():
            self.routers[number].to_router.append(grant)

    def settle(self) -> None:
        """Let every message arrive."""
        for router in self.routers.values():
            router.book()
            router.say()
        for _ in range(200):
            if not any(r.to_router or r.to_instance for r in self.routers.values()):
                return
            for number, router in self.routers.items():
                while router.to_instance:
                    self.credits.heard(number, *router.to_instance.popleft())
                self.deal()
                while router.to_router:
                    router.take(router.to_router.popleft())
                    router.book()
                    router.say()
        raise AssertionError("credits never come to rest")

    @invariant()
    def nothing_is_granted_or_reserved_twice(self) -> None:
        self.credits.check_integrity()
        for k, total in enumerate(TOTALS):
            granted = sum(self.credits.grant_of(n).amounts[k] for n in self.routers)
            lost = sum(held[k] for held in self.orphaned)
            assert granted <= total
            assert lost + sum(r.held[k] for r in self.routers.values()) <= total

    def teardown(self) -> None:
        if not hasattr(self, "routers"):
            return
        # Whoever waits is served in the end, in turns where it wants nearly all of it.
        self.orphaned.clear()
        self.credits.set_orphaned([0] * len(TOTALS))
        self.deal()
        for _ in range(2 * len(self.routers) + 1):
            self.settle()
            for router in self.routers.values():
                router.held = [0] * len(TOTALS)
        self.settle()
        assert not any(any(router.queued) for router in self.routers.values())
        for router in self.routers.values():
            router.held = [0] * len(TOTALS)
        self.settle()
        for k, total in enumerate(TOTALS):
            if len(self.routers) == 1:
                [router] = self.routers.values()
                assert router.credit[k] == total
            for router in self.routers.values():
                assert router.credit[k] >= total // len(self.routers) - total // 4


TestCredits = CreditsMachine.TestCase
TestCredits.settings = settings(deadline=None)
