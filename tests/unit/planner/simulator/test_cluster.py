"""Whole simulations: nobody is lost or served twice, and times are what theory says."""

from dataclasses import replace

import numpy as np
import pytest

from planner.layout import Role
from planner.pools import Slo
from planner.queueing import prefill_wait
from planner.simulator.arrivals import at_random
from planner.simulator.calls import Call
from planner.simulator.cluster import Simulation
from planner.simulator.outcome import outcome
from planner.simulator.setup import Beside, Loss, Prefills, Setup, Shared
from planner.traces import Request
from tests.unit.planner.simulator.pools import COSTS, colocated, load, split

SETUPS = {
    "split": split(),
    "expected": split(policy="expected"),
    "two routers": split(routers=2),
    "colocated": colocated(),
    "colocated, two routers": colocated(routers=2),
}


def one(setup: Setup, prompt_tokens: int, output_tokens: int) -> Call:
    request = Request(at_s=1.0, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    return Simulation(setup).run([request])[0]


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("rate", [2, 60])
def test_every_request_ends_exactly_once_and_all_room_comes_back(name: str, rate: float) -> None:
    simulation = Simulation(SETUPS[name])
    requests = load(300, rate)
    calls = simulation.run(requests)
    assert len(calls) == len(requests)
    for call in calls:
        assert call.is_finished
        assert not call.refused
        assert call.at_s < call.first_at <= call.ended_at
    assert simulation.is_idle


def test_what_is_refused_is_told_and_never_served() -> None:
    requests = load(400, 500)
    requests[7] = replace(requests[7], prompt_tokens=200_000)
    simulation = Simulation(split(max_queue=8, max_queue_wait_s=0.5))
    calls = simulation.run(requests)
    assert calls[7].refused == "NEVER_FITS"
    assert all(bool(call.refused) is not call.is_finished for call in calls)
    assert simulation.is_idle


@pytest.mark.parametrize("name", SETUPS)
def test_the_same_load_gives_the_same_times(name: str) -> None:
    first, second = (Simulation(SETUPS[name]).run(load(200, 30)) for _ in range(2))
    assert first == second


def test_one_request_takes_what_its_parts_take() -> None:
    beside = Beside(request_s=0.002, answer_s=0.003, hand_over_s=0.004)
    call = one(split(beside=beside), 1000, 11)
    assert call.ttft_s == pytest.approx(0.002 + 0.1 + 0.003)
    # The transfer was hidden but for its end; then ten steps with 1000 to 1009 tokens cached.
    steps_s = sum(10e-3 + 1e-3 + 1e-7 * (1000 + step) for step in range(10))
    assert call.tpot_s == pytest.approx((1e-3 + 0.004 + steps_s) / 10)


def test_a_transfer_slower_than_prefill_is_waited_for() -> None:
    slow = replace(COSTS, transfer_token_s=1e-3)
    setup = split(1, 1)
    assert setup.prefills is not None
    setup = replace(setup, prefills=replace(setup.prefills, costs=slow))
    fast_s, slow_s = one(split(1, 1), 1000, 2).ended_at, one(setup, 1000, 2).ended_at
    assert slow_s - fast_s == pytest.approx(1.001 - 0.1 - 1e-3, abs=1e-6)


def test_prompts_of_colocated_instances_come_in_chunks() -> None:
    call = one(colocated(1, chunk_tokens=400), 1000, 2)
    assert call.ttft_s == pytest.approx(3 * 10e-3 + 1000 * 1e-4)


def test_prefill_alone_waits_as_an_m_d_1_queue() -> None:
    # Each prompt fills a step of 0.2048 s: a load of 0.6.
    requests = at_random(12_000, 2048, 1, 3 / 1.024, seed=5)
    calls = Simulation(split(1, 1)).run(requests)
    mean_wait_s = sum(call.ttft_s - 0.2048 for call in calls) / len(calls)
    theory = prefill_wait(3 / 1.024, np.array([0.2048]), 1, 1.0)
    assert theory is not None
    assert mean_wait_s == pytest.approx(theory.chance * theory.mean_s, rel=0.1)


def test_a_long_prompt_holds_up_tokens_only_where_it_is_computed_beside_them() -> None:
    requests = [
        Request(at_s=0.0, prompt_tokens=10, output_tokens=100),
        Request(at_s=0.5, prompt_tokens=4000, output_tokens=1),
    ]
    alone, apart, together = (
        Simulation(setup).run(those)[0].ended_at
        for setup, those in (
            (split(1, 1), requests[:1]),
            (split(1, 1), requests),
            (colocated(1), requests),
        )
    )
    assert apart == alone
    assert together - alone == pytest.approx(4000 * 1e-4, rel=0.1)


def test_colocated_instances_use_all_devices_for_whatever_there_is() -> None:
    slo = Slo(ttft_s=9.0, tpot_s=9.0, attainment=0.9)
    prompts = [replace(each, output_tokens=1) for each in load(300, 40)]
    apart = outcome(Simulation(split(2, 2)).run(prompts), slo, 40)
    together = outcome(Simulation(colocated(4)).run(prompts), slo, 40)
    assert together.ttft_s[90] < apart.ttft_s[90]


@pytest.mark.parametrize(
    "setup",
    [
        split(losses=[Loss(role=Role.DECODE, instance=1, at_s=4.0)]),
        split(losses=[Loss(role=Role.PREFILL, instance=0, at_s=4.0)]),
        colocated(losses=[Loss(role=Role.DECODE, instance=0, at_s=4.0)]),
    ],
    ids=["decode", "prefill", "colocated"],
)
def test_requests_of_a_lost_instance_end_elsewhere(setup: Setup) -> None:
    requests = load(200, 30)
    simulation = Simulation(setup)
    calls = simulation.run(requests)
    whole = Simulation(replace(setup, losses=())).run(requests)
    moved = [call for call in calls if call.moves]
    assert moved
    assert all(call.is_finished and call.tokens < call.output_tokens for call in calls)
    assert simulation.is_idle
    # Before the loss all was as without it, and a first token is given once.
    for call, other in zip(calls, whole, strict=True):
        if other.ended_at < 4.0:
            assert call == other
        if call.tokens and other.first_at < 4.0:
            assert call.first_at == other.first_at
    assert sum(call.ended_at for call in calls) > sum(other.ended_at for other in whole)


def test_without_any_instance_left_requests_are_told_so() -> None:
    losses = [Loss(role=Role.DECODE, instance=0, at_s=1.0)]
    calls = Simulation(split(1, 1, losses=losses)).run(load(60, 10))
    assert {call.refused for call in calls} == {"", "NO_INSTANCE"}
    assert all(bool(call.refused) is not call.is_finished for call in calls)


def test_roles_that_share_cores_slow_each_other_down() -> None:
    requests = load(100, 10)
    apart, sharing = (
        Simulation(split(1, 1, shared=shared)).run(requests)
        for shared in (Shared(), Shared(prefill=1.5, decode=1.5))
    )
    assert sum(call.ttft_s for call in sharing) > 1.2 * sum(call.ttft_s for call in apart)
    slower = sum(call.tpot_s for call in sharing) / sum(call.tpot_s for call in apart)
    assert 1.05 < slower < 2


def test_a_setup_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="3 routers need an instance"):
        split(routers=3)
    with pytest.raises(ValueError, match="no prefill instance 5"):
        split(losses=[Loss(role=Role.PREFILL, instance=5, at_s=1.0)])
    prefills = Prefills(costs=COSTS, instances=1, kv_tokens=1000)
    with pytest.raises(ValueError, match="either"):
        replace(colocated(), prefills=prefills)
