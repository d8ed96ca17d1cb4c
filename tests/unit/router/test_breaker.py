"""When an instance that fails gets nothing more, and when it does again."""

import random

import pytest

from router.breaker import Breakers, BreakerSettings, State

SETTINGS = BreakerSettings(
    share=0.5, least=4, last=8, window_s=10.0, pause_s=1.0, longest_pause_s=4.0, jitter=0.0
)


def breakers(settings: BreakerSettings = SETTINGS) -> Breakers[str]:
    return Breakers(settings, random.Random(1))


def fail(found: Breakers[str], times: int, now: float = 0.0, others: bool = True) -> float | None:
    pause_s = None
    for _ in range(times):
        pause_s = found.failed("a", now, has_others=lambda: others)
    return pause_s


def test_few_failures_open_nothing() -> None:
    found = breakers()
    assert fail(found, 3) is None
    assert found.state("a") is State.CLOSED
    assert fail(found, 1) == 1.0
    assert (found.state("a"), found.state("b")) == (State.OPEN, State.CLOSED)


def test_failures_open_only_as_a_share_of_what_ended() -> None:
    found = breakers()
    for _ in range(5):
        found.succeeded("a", 0.0)
    assert fail(found, 3) is None
    assert fail(found, 1) == 1.0  # four of the last eight


def test_what_is_long_ago_does_not_count() -> None:
    found = breakers()
    assert fail(found, 3, now=0.0) is None
    assert fail(found, 3, now=11.0) is None
    assert fail(found, 1, now=11.0) == 1.0


def test_last_instance_is_never_opened() -> None:
    found = breakers()
    assert fail(found, 20, others=False) is None
    assert found.state("a") is State.CLOSED
    assert fail(found, 1) == 1.0


def test_one_that_goes_well_after_the_pause_closes() -> None:
    found = breakers()
    fail(found, 4)
    assert not found.succeeded("a", 0.5)  # it had begun before
    assert found.half_open("a")
    assert found.state("a") is State.HALF_OPEN
    assert found.succeeded("a", 1.0)
    assert found.state("a") is State.CLOSED
    assert fail(found, 3, now=1.0) is None  # all else is forgotten


def test_each_pause_is_longer_up_to_the_longest() -> None:
    found = breakers()
    pauses = [fail(found, 4)]
    for _ in range(3):
        assert found.half_open("a")
        pauses.append(fail(found, 1))
    assert pauses == [1.0, 2.0, 4.0, 4.0]


def test_failures_of_what_had_begun_before_change_nothing() -> None:
    found = breakers()
    fail(found, 4)
    assert fail(found, 3) is None
    assert found.count(State.OPEN) == 1


def test_pauses_differ_by_chance() -> None:
    jittered = BreakerSettings(least=1, jitter=0.5, pause_s=1.0)
    pauses = {
        Breakers[str](jittered, random.Random(seed)).failed("a", 0.0, has_others=lambda: True)
        for seed in range(8)
    }
    assert len(pauses) == 8
    assert all(pause is not None and 1.0 <= pause <= 1.5 for pause in pauses)


def test_a_share_of_nothing_switches_it_off() -> None:
    assert fail(breakers(BreakerSettings(share=0.0)), 50) is None


@pytest.mark.parametrize("opened", [False, True])
def test_what_is_forgotten_is_closed(opened: bool) -> None:
    found = breakers()
    fail(found, 4 if opened else 1)
    assert found.close("a") is opened
    fail(found, 4)
    found.forget("a")
    assert found.state("a") is State.CLOSED
    assert not found.half_open("a")


# ---- transfers


class Fleet:
    """Instances that transfer to each other, told as the router tells of them."""

    def __init__(self, *bad: str) -> None:
        self.found = breakers()
        self.bad = bad

    def transfer(self, source: str, target: str, now: float = 0.0) -> None:
        is_failure = source in self.bad or target in self.bad
        self.found.transferred(source, target, now, is_failure=is_failure)
        if not is_failure:
            self.found.succeeded(source, now)
            self.found.succeeded(target, now)
            return
        for key, partner in ((source, target), (target, source)):
            self.found.failed(key, now, has_others=lambda: True, partner=partner)

    def open(self) -> set[str]:
        return {key for key in ("p1", "p2", "d1", "d2") if self.found.state(key) is State.OPEN}


@pytest.mark.parametrize("bad", ["p1", "d1"])
def test_lost_transfers_open_the_one_that_loses_them_with_all_others(bad: str) -> None:
    fleet = Fleet(bad)
    for source, target in [("p1", "d1"), ("p1", "d2"), ("p2", "d1"), ("p2", "d2")] * 4:
        fleet.transfer(source, target)
    assert fleet.open() == {bad}


@pytest.mark.parametrize("bad", ["p1", "d1"])
def test_only_partner_is_to_blame_where_it_does_well_with_nobody(bad: str) -> None:
    """One role has a single instance: what it does with the other one speaks for it."""
    fleet = Fleet(bad)
    only = "d2" if bad == "p1" else "p2"
    others = ("p1", "p2") if bad == "p1" else ("d1", "d2")
    for _ in range(4):
        for other in others:
            fleet.transfer(*((other, only) if bad == "p1" else (only, other)))
    assert fleet.open() == {bad}


def test_nobody_is_opened_while_nothing_tells_who_is_to_blame() -> None:
    fleet = Fleet("p1")
    for _ in range(6):
        fleet.transfer("p1", "d1")
    assert fleet.open() == set()
    fleet.transfer("p2", "d1")
    fleet.transfer("p1", "d1")
    assert fleet.open() == {"p1"}


def test_way_between_two_that_is_cut_opens_neither() -> None:
    fleet = Fleet()
    for _ in range(4):
        fleet.transfer("p1", "d2")
        fleet.transfer("p2", "d1")
        fleet.bad = ("p1",)
        fleet.transfer("p1", "d1")
        fleet.bad = ()
    assert fleet.open() == set()


def test_evidence_counts_no_longer_than_failures() -> None:
    fleet = Fleet("p1")
    fleet.transfer("p2", "d1")
    for _ in range(6):
        fleet.transfer("p1", "d1", now=20.0)
    assert fleet.open() == set()


def test_other_failures_need_no_partner() -> None:
    fleet = Fleet()
    fleet.transfer("p1", "d1")
    for _ in range(4):
        fleet.found.failed("p1", 0.0, has_others=lambda: True)
    assert fleet.open() == {"p1"}


def test_one_that_is_tried_is_not_opened_for_a_bad_partner() -> None:
    fleet = Fleet("p1")
    for _ in range(4):
        for source, target in (("p1", "d1"), ("p1", "d2"), ("p2", "d1"), ("p2", "d2")):
            fleet.transfer(source, target)
    fail_d1 = [fleet.found.failed("d1", 0.0, has_others=lambda: True) for _ in range(8)]
    assert any(fail_d1)
    assert fleet.found.half_open("d1")
    fleet.transfer("p1", "d1")
    assert fleet.found.state("d1") is State.HALF_OPEN
    assert fleet.found.half_open("p1")
    fleet.transfer("p1", "d2")
    assert fleet.found.state("p1") is State.OPEN
