"""Many steps at once take as long as one after the other."""

import random

import pytest

from planner.simulator.clock import Clock
from planner.simulator.decode_instance import DecodeInstance
from planner.simulator.setup import Decodes
from tests.unit.planner.simulator.pools import COSTS

Arrival = tuple[float, int, int]


def ends(arrivals: list[Arrival], max_batch: int = 64) -> dict[int, float]:
    clock = Clock()
    found: dict[int, float] = {}
    pool = Decodes(costs=COSTS, instances=1, kv_tokens=1 << 30, max_batch=max_batch)
    instance = DecodeInstance(
        clock, pool, on_first=lambda _: None, on_end=lambda r: found.update({r: clock.now})
    )

    def add(request_id: int, prompt_tokens: int, output_tokens: int) -> None:
        instance.add(request_id, prompt_tokens=prompt_tokens, output_tokens=output_tokens)

    for number, (at_s, prompt, output) in enumerate(arrivals):
        clock.at(at_s, lambda each=(number, prompt, output): add(*each))  # type: ignore[misc]
    clock.run()
    return found


def step_by_step(arrivals: list[Arrival], max_batch: int = 64) -> dict[int, float]:
    """The same by a loop that takes each step."""
    coming = sorted(((at_s, number) for number, (at_s, *_) in enumerate(arrivals)), reverse=True)
    ready: list[int] = []
    running: dict[int, int] = {}
    found: dict[int, float] = {}
    now = 0.0
    while coming or ready or running:
        if not ready and not running:
            now = max(now, coming[-1][0])
        while coming and coming[-1][0] <= now:
            ready.append(coming.pop()[1])
        while ready and len(running) < max_batch:
            running[ready.pop(0)] = 1
        cached = sum(arrivals[r][1] + tokens - 1 for r, tokens in running.items())
        now += COSTS.decode_step_s(len(running), cached)
        for r in list(running):
            running[r] += 1
            if running[r] == arrivals[r][2]:
                found[r] = now
                del running[r]
    return found


@pytest.mark.parametrize("max_batch", [64, 3])
@pytest.mark.parametrize("gap_s", [1e-5, 0.003, 0.05, 1.0])
def test_steps_taken_at_once_end_when_they_would_one_by_one(gap_s: float, max_batch: int) -> None:
    rng = random.Random(f"{gap_s} {max_batch}")
    arrivals = [
        (number * gap_s * rng.random(), rng.randint(1, 3000), rng.randint(2, 200))
        for number in range(40)
    ]
    assert ends(arrivals, max_batch) == pytest.approx(step_by_step(arrivals, max_batch))


def test_the_tokens_of_a_sequence_are_known_at_any_time() -> None:
    clock = Clock()
    pool = Decodes(costs=COSTS, instances=1, kv_tokens=1 << 20)
    instance = DecodeInstance(clock, pool, on_first=lambda _: None, on_end=lambda _: None)
    instance.add(1, prompt_tokens=1, output_tokens=100)
    seen: list[int] = []
    for moment in (0.0109, 0.0111, 0.0999, 0.1111):
        clock.at(moment, lambda: seen.append(instance.tokens_of(1)))
    clock.run()
    assert seen == [1, 2, 10, 11]
