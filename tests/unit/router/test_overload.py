"""Far more requests than the pools can take: what they can take is done all the same."""

import random
from statistics import mean, pstdev

import pytest

from router.ledger import Need
from router.queue import Waiting
from service.errors import Refused
from tests.unit.router.pools import Call, Pools, arrivals

LOADS = (1.0, 2.0, 4.0, 10.0)
PATIENCE_S = 20.0
LASTS_S = 240.0
WARM_S = 60.0
# By what is short: blocks, sequences, or prefill; and about how many requests a second they take.
POOLS = {
    "blocks": ({"blocks": 1024, "sequences": 64}, 4.0),
    "sequences": ({"blocks": 8192, "sequences": 24}, 5.5),
    "prefill": ({"blocks": 8192, "sequences": 512, "prefill_tokens_per_s": 2000.0}, 4.0),
}


def overloaded(kind: str, load: float, *, refuses_early: bool) -> Pools:
    options, capacity_per_s = POOLS[kind]
    pools = Pools(refuses_early=refuses_early, max_queue=1024, **options)  # type: ignore[arg-type]
    rng = random.Random(7)

    def come() -> None:
        most = rng.randrange(64, 400)
        pools.come(
            Call(
                tenant="",
                came_at=pools.now,
                start_by=pools.now + PATIENCE_S,
                need=Need(prompt_tokens=rng.randrange(50, 1000), max_new_tokens=most),
                output_tokens=rng.randrange(most // 4, most + 1),
            )
        )

    for moment in arrivals(rng, load * capacity_per_s, LASTS_S):
        pools.at(moment, come)
    pools.run(LASTS_S)
    return pools


def goodput(pools: Pools, since: float = WARM_S, until: float = LASTS_S) -> float:
    """Output tokens a second of requests that had started in time."""
    done = [
        c.output_tokens
        for c in pools.calls
        if c.ended_at is not None and since <= c.ended_at < until and c.started_in_time
    ]
    return sum(done) / (until - since)


def wasted(pools: Pools) -> float:
    """Part of the requests that waited for nothing: refused later, or started too late."""
    late = [
        c
        for c in pools.calls
        if (c.refused_at is not None and c.refused_at > c.came_at)
        or (c.prefill_at is not None and not c.started_in_time)
    ]
    return len(late) / len(pools.calls)


@pytest.mark.parametrize("kind", sorted(POOLS))
def test_ten_times_too_much_costs_no_goodput_and_makes_none_of_it_swing(kind: str) -> None:
    runs = [overloaded(kind, load, refuses_early=True) for load in LOADS]
    figures = [goodput(pools) for pools in runs]
    assert figures[-1] >= 0.95 * max(figures)
    # Where it swings, some of these spans have a fraction of what others have.
    spans = [goodput(runs[-1], t, t + 20.0) for t in range(int(WARM_S), int(LASTS_S), 20)]
    assert pstdev(spans) < 0.15 * mean(spans)
    assert wasted(runs[-1]) < 0.03


@pytest.mark.parametrize("kind", sorted(POOLS))
def test_fewer_wait_for_nothing_than_where_all_may_wait(kind: str) -> None:
    early, late = (overloaded(kind, 4.0, refuses_early=early) for early in (True, False))
    assert wasted(early) < 0.1 * wasted(late)
    assert goodput(early) > 0.85 * goodput(late)


@pytest.mark.parametrize("kind", sorted(POOLS))
def test_what_the_pools_can_take_is_not_refused(kind: str) -> None:
    pools = overloaded(kind, 0.8, refuses_early=True)
    assert not [c.reason for c in pools.calls if c.reason]


def test_crowd_that_comes_at_once_is_let_in_as_far_as_it_can_start() -> None:
    """The rate at which room came back before would have been that of a pool all but empty."""
    pools = Pools(blocks=1024, sequences=64)
    rng = random.Random(3)

    def come(count: int) -> None:
        for _ in range(count):
            need = Need(prompt_tokens=160, max_new_tokens=96)
            call = Call(
                tenant="",
                came_at=pools.now,
                start_by=pools.now + 8.0,
                need=need,
                output_tokens=rng.randrange(48, 96),
            )
            pools.come(call)

    for moment in range(40):
        pools.at(float(moment), lambda: come(1))
    pools.at(40.0, lambda: come(800))
    pools.run(60.0)
    crowd = pools.calls[40:]
    # 64 at a time, for about 1.5 seconds each.
    assert sum(c.ended_at is not None for c in crowd) > 0.9 * 64 * 8.0 / 1.5
    assert {c.reason for c in crowd} <= {"", "PREDICTED_WAIT", "QUEUE_WAIT", "QUEUE_FULL"}
    late = [c for c in crowd if c.reason == "QUEUE_WAIT"]
    assert len(late) < 0.05 * len(crowd)


def test_nothing_is_refused_on_a_guess() -> None:
    pools = Pools(blocks=64, max_queue=64)
    for _ in range(60):
        need = Need(prompt_tokens=500, max_new_tokens=500)
        pools.come(Call(tenant="", came_at=0.0, start_by=1.0, need=need, output_tokens=500))
    assert not [c.reason for c in pools.calls if c.reason]


def test_refusal_says_when_the_request_could_start() -> None:
    pools = overloaded("blocks", 10.0, refuses_early=True)
    need = Need(prompt_tokens=500, max_new_tokens=200)
    start_by = pools.now + PATIENCE_S

    def crowd() -> None:
        for request_id in range(-50, 0):
            waiting = Waiting(request_id=request_id, need=need, priority=0, start_by=start_by)
            pools.gate.offer(waiting, pools.now)

    with pytest.raises(Refused) as caught:
        crowd()
    assert caught.value.reason == "PREDICTED_WAIT"
    assert caught.value.retry_after_s is not None
    assert PATIENCE_S < caught.value.retry_after_s < 1.5 * PATIENCE_S
