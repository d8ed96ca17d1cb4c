"""What is foretold of a wait, and what is not."""

import pytest

from router.forecast import MIN_ENDS, Forecast, Load, Owed
from router.ledger import InstanceKey, Need
from router.queue import Demand

FAST = InstanceKey("fast", 1)
SLOW = InstanceKey("slow", 1)
NEED = Need(prompt_tokens=100, max_new_tokens=100)


def load(
    *,
    before: Demand | None = None,
    own_tokens: float = 200,
    free_tokens: float = 0,
    free_sequences: float = 10,
    prefills: tuple[InstanceKey, ...] = (),
    owed: float = 0,
) -> Load:
    return Load(
        before=before or Demand(),
        own_tokens=own_tokens,
        free_tokens=free_tokens,
        capacity_tokens=1000,
        free_sequences=free_sequences,
        capacity_sequences=20,
        prefills=prefills,
        owed=owed,
    )


def forecast(ends: int = MIN_ENDS, *, decode_s: float = 10.0, tenant: str = "a") -> Forecast:
    made = Forecast()
    for _ in range(ends):
        made.room_came_back(tenant, NEED, tokens=200, before_s=1.0, decode_s=decode_s, now=50.0)
    return made


def test_full_pool_gives_its_room_back_once_in_the_time_that_it_is_held() -> None:
    assert forecast().wait_s(load(), 50.0) == pytest.approx(11.0 * 200 / 1000)
    behind_one = load(before=Demand(sequence_s=11.0, token_s=11.0 * 200))
    assert forecast().wait_s(behind_one, 50.0) == pytest.approx(11.0 * 400 / 1000)


def test_places_may_be_scarcer_than_room() -> None:
    short_of_places = load(free_tokens=900, free_sequences=0)
    assert forecast().wait_s(short_of_places, 50.0) == pytest.approx(11.0 / 20)


def test_free_room_is_not_waited_for() -> None:
    assert forecast().wait_s(load(free_tokens=200), 50.0) == 0.0


@pytest.mark.parametrize("made", [Forecast(), forecast(MIN_ENDS - 1)])
def test_too_few_ends_foretell_nothing(made: Forecast) -> None:
    assert made.wait_s(load(), 50.0) is None
    assert made.hold_s("a", NEED) is None


def test_ends_of_long_ago_foretell_nothing() -> None:
    assert forecast().wait_s(load(), 100.0) is not None
    assert forecast().wait_s(load(), 120.0) is None


def test_tenants_that_stop_early_hold_their_room_for_less() -> None:
    made = forecast(tenant="brief", decode_s=1.0)
    for _ in range(MIN_ENDS):
        made.room_came_back("wordy", NEED, tokens=200, before_s=1.0, decode_s=9.0, now=50.0)
    assert made.hold_s("brief", NEED) == pytest.approx(2.0)
    assert made.hold_s("wordy", NEED) == pytest.approx(10.0)
    assert made.hold_s("new", NEED) == pytest.approx(6.0, rel=0.05)


def computing(made: Forecast, key: InstanceKey, prompt_s: float) -> None:
    """Has an instance compute prompts of 100 tokens, of which one always waits."""
    made.prefill_began(key, 0.0)
    for number in range(MIN_ENDS):
        made.prefill_began(key, number * prompt_s)
        made.prefill_ended(key, 100, (number + 1) * prompt_s)


def test_prompts_before_it_are_computed_at_the_rate_of_all_instances() -> None:
    made = Forecast()
    computing(made, FAST, prompt_s=0.1)
    one = load(prefills=(FAST,), owed=500, before=Demand(prompt_tokens=1500), own_tokens=0)
    assert made.wait_s(one, 9.0) == pytest.approx(2.0)
    both = load(prefills=(FAST, SLOW), owed=500, before=Demand(prompt_tokens=1500), own_tokens=0)
    assert made.wait_s(both, 9.0) is None  # nothing is known of the other
    computing(made, SLOW, prompt_s=0.3)
    assert made.wait_s(both, 9.0) == pytest.approx(2000 / (1000 + 1000 / 3))
    made.keep_prefills({SLOW})
    assert made.wait_s(one, 9.0) is None


def test_single_prompts_say_nothing_of_what_prefill_can_do() -> None:
    made = Forecast()
    for number in range(2 * MIN_ENDS):
        made.prefill_began(FAST, float(number))
        made.prefill_ended(FAST, 10, number + 0.5)
    assert made.wait_s(load(prefills=(FAST,), owed=500, own_tokens=0), 99.0) is None


def test_prompts_of_lower_priority_are_not_before_one_and_tenants_take_turns() -> None:
    owed = Owed()
    owed.add(0, "flood", 10_000)
    owed.add(-1, "flood", 10_000)
    assert owed.before(0, "flood", 100) == 10_000
    assert owed.before(0, "b", 100) == 100  # as much of the flood's, in turn
    assert owed.before(1, "b", 100) == 0
    owed.add(1, "c", 50)
    assert owed.before(0, "b", 100) == 150
    owed.add(1, "c", -50)
    assert owed.before(0, "b", 100) == 100
