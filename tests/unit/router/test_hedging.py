"""When a prompt is late, and how many may be asked for twice."""

import pytest

from router.hedging import Hedging


def knowing(factor: float = 3.0, seconds: float = 0.2, tokens: int = 100) -> Hedging:
    hedging = Hedging(factor)
    for _ in range(8):
        hedging.first_came(tokens, seconds)
    return hedging


def test_nobody_is_late_before_anything_is_known() -> None:
    hedging = Hedging(3.0)
    for _ in range(7):
        hedging.first_came(100, 0.2)
    assert hedging.began(100) is None
    hedging.first_came(100, 0.2)
    assert hedging.began(100) == pytest.approx(0.6)


def test_long_prompts_may_take_longer_and_short_ones_as_long_as_usual() -> None:
    hedging = knowing()
    assert hedging.began(1000) == pytest.approx(6.0)
    assert hedging.began(1) == pytest.approx(0.6)


def test_what_is_late_by_milliseconds_is_not_worth_it() -> None:
    assert knowing(seconds=0.0001).began(10) == 0.05


def test_factor_of_nothing_switches_it_off() -> None:
    assert knowing(factor=0.0).began(100) is None


def test_no_more_than_a_twentieth_of_all_is_hedged_but_for_the_first() -> None:
    hedging, hedged = knowing(), 0
    for _ in range(1000):
        hedging.began(100)
        hedged += hedging.spend()
    assert 50 <= hedged <= 51


def test_what_was_not_spent_is_not_kept_for_ever() -> None:
    hedging = knowing()
    for _ in range(10_000):
        hedging.began(100)
    assert sum(hedging.spend() for _ in range(100)) == 8
