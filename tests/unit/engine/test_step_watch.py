"""A step's parts add up to the step, whatever calls what."""

import itertools

import torch

from engine.dispatch import Members
from engine.step_watch import ATTENTION, COLLECTIVES, EXPERTS, PARTS, REST, StepWatch
from engine.tally import Count, CountedCollectives, Tally
from tests.unit.engine.dispatch.loopback import on_ranks


class Clock:
    """Time that passes only when it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def spent(watch: StepWatch) -> dict[str, float]:
    return {part: seconds for part, seconds in watch.seconds.items() if seconds}


def test_each_moment_is_one_parts() -> None:
    clock = Clock()
    watch = StepWatch(clock)
    for _ in range(2):
        watch.begin()
        for part, seconds in ((ATTENTION, 1.0), (EXPERTS, 2.0), (COLLECTIVES, 4.0), (REST, 8.0)):
            clock.now += seconds
            watch.to(part)
        clock.now += 16
        watch.end()
        clock.now += 1000
    assert spent(watch) == {REST: 34.0, ATTENTION: 4.0, EXPERTS: 8.0, COLLECTIVES: 16.0}


def test_nothing_is_counted_outside_of_steps() -> None:
    clock = Clock()
    watch = StepWatch(clock)
    assert watch.to(ATTENTION) is None
    clock.now += 1
    watch.move({EXPERTS: 1.0})
    watch.end()
    assert spent(watch) == {}


def test_a_step_that_has_begun_goes_on() -> None:
    clock = Clock()
    watch = StepWatch(clock)
    watch.begin()
    clock.now += 1
    watch.begin()
    clock.now += 1
    watch.end()
    assert spent(watch) == {REST: 2.0}


def test_what_is_moved_to_other_parts_leaves_the_sum_alone() -> None:
    clock = Clock()
    watch = StepWatch(clock)
    watch.begin()
    clock.now += 8
    watch.move({ATTENTION: 2.0, EXPERTS: 5.0})
    clock.now += 1
    watch.end()
    assert spent(watch) == {REST: 2.0, ATTENTION: 2.0, EXPERTS: 5.0}
    assert sum(watch.seconds.values()) == 9.0


def test_the_parts_are_always_the_same() -> None:
    assert tuple(StepWatch().seconds) == PARTS


def test_a_collective_is_no_part_of_what_wants_it() -> None:
    def on_rank(members: Members) -> None:
        ticks = itertools.count()
        watch = StepWatch(lambda: float(next(ticks)))
        tally = Tally(watch=watch)
        ranks = CountedCollectives(members.tp, tally)
        watch.begin()
        watch.to(ATTENTION)
        ranks.all_reduce(torch.ones(3))
        watch.end()
        assert spent(watch) == {REST: 1.0, ATTENTION: 2.0, COLLECTIVES: 1.0}
        assert tally.so_far() == {"all_reduce": Count(1, 12)}

    on_ranks(on_rank, tp=2)
