"""Experts change places where that helps, one layer a step, once all ranks have read them."""

from collections.abc import Callable

import pytest

from decode.balancer import Balancer
from decode.orders import NOTHING, Order, Placing
from engine.dispatch.balance import imbalance

EVEN = ((0, 1, 2, 3), (4, 5, 6, 7))
# Two hot experts on the first rank.
SKEWED = [1000, 1000, 10, 10, 10, 10, 10, 10]
LEVEL = [100] * 8


class Instance:
    """A balancer, its clock, and what it has asked for; nothing runs in the background."""

    def __init__(self, interval_s: float = 10.0, most_slots: int = 8) -> None:
        self.now = 0.0
        self.placings: list[Placing] = []
        self._later: list[Callable[[], object]] = []
        self.balancer = Balancer(
            even=EVEN,
            ranks=2,
            interval_s=interval_s,
            most_slots=most_slots,
            stage=self.placings.append,
            later=self._later.append,
            clock=lambda: self.now,
            rest=lambda: None,
        )

    def run_later(self) -> None:
        while self._later:
            self._later.pop(0)()

    def round(self, loads: dict[int, list[int]]) -> None:
        """Let the interval pass, and all ranks say the same half of `loads`."""
        self.now += 10.0
        assert self.balancer.order() == Order(take_loads=True)
        for rank in (0, 1):
            assert self.balancer.order() == NOTHING
            half = {layer: [n // 2 for n in loads_E] for layer, loads_E in loads.items()}
            self.balancer.took_loads(rank, half)
        self.run_later()


@pytest.fixture
def instance() -> Instance:
    return Instance()


def test_loads_are_asked_for_once_in_an_interval(instance: Instance) -> None:
    assert instance.balancer.order() == NOTHING
    instance.round({0: LEVEL})
    assert instance.balancer.order() == NOTHING
    assert instance.placings == []
    instance.round({0: LEVEL})
    figures = instance.balancer.figures()
    assert figures.tokens == {0: [200] * 8}
    assert figures.imbalance == {0: 1.0}
    assert figures.switches == 0


def test_ranks_switch_with_one_step_when_all_have_read(instance: Instance) -> None:
    instance.round({3: SKEWED})
    [placing] = instance.placings
    assert (placing.number, placing.layer) == (1, 3)
    assert imbalance(SKEWED, placing.slots) < 1.05
    assert instance.balancer.order() == NOTHING
    instance.balancer.staged(1, 1)
    assert instance.balancer.order() == NOTHING
    instance.balancer.staged(0, 1)
    assert instance.balancer.order() == Order(switch=1)
    assert instance.balancer.order() == NOTHING
    figures = instance.balancer.figures()
    assert figures.switches == 1
    assert figures.before == pytest.approx(imbalance(SKEWED, EVEN))
    assert figures.after == pytest.approx(imbalance(SKEWED, placing.slots))


def test_layers_are_placed_one_after_another_the_worst_first(instance: Instance) -> None:
    milder = [300, 300, 100, 100, 100, 100, 100, 100]
    instance.round({0: milder, 1: SKEWED, 2: LEVEL})
    for number, layer in ((1, 1), (2, 0)):
        assert [placing.layer for placing in instance.placings] == [1, 0][:number]
        for rank in (0, 1):
            instance.balancer.staged(rank, number)
        assert instance.balancer.order() == Order(switch=number)
        assert instance.placings[-1].layer == layer
        instance.run_later()
    assert len(instance.placings) == 2
    assert instance.balancer.order() == NOTHING


def test_many_experts_of_a_layer_move_in_several_placings() -> None:
    instance = Instance(most_slots=1)
    loads = [1000, 1000, 1000, 1000, 10, 10, 10, 10]
    instance.round({0: loads})
    for number in (1, 2):
        assert len(instance.placings) == number
        for rank in (0, 1):
            instance.balancer.staged(rank, number)
        assert instance.balancer.order() == Order(switch=number)
        instance.run_later()
    first, second = (imbalance(loads, placing.slots) for placing in instance.placings)
    assert imbalance(loads, EVEN) > first > second
    figures = instance.balancer.figures()
    assert (figures.rounds, figures.switches) == (1, 2)
    assert figures.after == pytest.approx(second)


def test_the_next_round_begins_from_the_new_places(instance: Instance) -> None:
    instance.round({0: SKEWED})
    for rank in (0, 1):
        instance.balancer.staged(rank, 1)
    assert instance.balancer.order() == Order(switch=1)
    instance.run_later()
    instance.round({0: SKEWED})
    assert len(instance.placings) == 1
    assert instance.balancer.figures().imbalance[0] < 1.05


def test_little_gain_moves_nothing(instance: Instance) -> None:
    instance.round({0: [104, 100, 100, 100, 100, 100, 100, 100]})
    assert instance.placings == []


def test_few_tokens_are_kept_until_there_are_more(instance: Instance) -> None:
    few = [each // 20 // 2 * 2 for each in SKEWED]
    rounds = 0
    while not instance.placings:
        instance.round({0: few})
        rounds += 1
        assert rounds < 9
    assert rounds == 2


def test_experts_that_cannot_be_read_stay_and_serving_goes_on(instance: Instance) -> None:
    instance.round({0: SKEWED, 1: SKEWED})
    instance.balancer.staged(0, 1)
    instance.balancer.staged(1, 1, "the file is gone")
    instance.balancer.staged(0, 1)
    assert instance.balancer.order() == NOTHING
    instance.round({0: SKEWED})  # loads are still counted
    assert len(instance.placings) == 1
    assert instance.balancer.figures().switches == 0


def test_interval_of_zero_counts_and_moves_nothing() -> None:
    instance = Instance(interval_s=0.0)
    instance.now = 20.0
    instance.round({0: SKEWED})
    assert instance.placings == []
    assert instance.balancer.figures().imbalance[0] > 1.9
