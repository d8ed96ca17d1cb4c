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
