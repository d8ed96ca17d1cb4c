"""What a simulation is made of, from answers that took round times."""

import itertools

import pytest
from twinpool.types import RequestStats

from bench.goodputs.metrics import metrics
from bench.goodputs.records import Record
from bench.goodputs.runner import Run
from bench.goodputs.slo import Slo
from bench.simulated import rows_of, simulated
from bench.simulations.calibrated import calibrated
from bench.simulations.probes import Answer, Probed
from bench.workloads.arrivals import Arrival, Phases, plan
from planner.costs import Chunk
from planner.simulator.setup import Setup

WAY_S, HAND_OVER_S = 0.006, 0.004


def step_s(batch: int) -> float:
    return 0.010 + 0.002 * batch


def answer(
    sent_s: float, prompt_tokens: int, steps_s: list[float], *, times: float = 1.0
) -> Answer:
    """One whose prompt takes a millisecond a token, `times` that."""
    prefill_s = times * prompt_tokens * 1e-3
    first_s = sent_s + WAY_S + prefill_s
    came_s = itertools.accumulate([first_s, HAND_OVER_S + steps_s[0], *steps_s[1:]])
    stats = RequestStats(
        queue_s=0.0,
        prefill_s=prefill_s,
        handoff_s=0.0,
        kv_bytes=0,
        kv_transport="",
        prefill_instance="",
        decode_instance="",
        retries=0,
        cached_tokens=0,
        decode_cached_tokens=0,
        moves=0,
        pause_s=0.0,
    )
    return Answer(prompt_tokens=prompt_tokens, sent_s=sent_s, came_s=tuple(came_s), stats=stats)


def probed(at_s: float) -> Probed:
    alone = [answer(0.0, 64 * (1 + n % 4), [step_s(1)] * 8) for n in range(20)]
    batches = [[answer(0.0, 64, [step_s(batch)] * 30)] * batch for batch in (1, 2, 4)]
    # A prompt of 200 ms under way from 1 s on, during which steps take half as long again.
    beside = [answer(at_s + 0.994, 200, [0.02], times=1.25)]
    prefilled = 1.0, 1.25
    steps_s, now_s = [0.02], 0.02 + WAY_S + HAND_OVER_S
    while now_s < 3:
        steps_s.append(0.03 if prefilled[0] <= now_s < prefilled[1] - 0.015 else 0.02)
        now_s += steps_s[-1]
    background = [[answer(at_s, 0, steps_s)]]
    return Probed(alone=alone, batches=batches, beside=beside, background=background)


def setup() -> Setup:
    """Of a system that was probed twice and is as fast as before."""
    return calibrated(probed(0.0) + probed(100.0), kv_tokens=100_000)


def test_a_setup_is_as_fast_as_what_was_probed() -> None:
    found = setup()
    assert found.prefills is not None
    assert found.prefills.costs.prefill_s([Chunk(300)]) == pytest.approx(0.3, rel=0.01)
    for batch in (1, 3, 4):
        assert found.decodes.costs.decode_step_s(batch, 80 * batch) == pytest.approx(
            step_s(batch), rel=0.02
        )
    assert found.beside.request_s + found.beside.answer_s == pytest.approx(WAY_S)
    assert found.beside.hand_over_s == pytest.approx(HAND_OVER_S, rel=0.1)
    assert found.shared.prefill == pytest.approx(1.25, rel=0.01)
    assert found.shared.decode == pytest.approx(1.5, rel=0.05)


def test_the_real_systems_figures_stand_beside_the_simulations() -> None:
    arrivals = [Arrival(at_s=n * 2.0, prompt_tokens=200, output_tokens=11) for n in range(10)]
    planned = plan(arrivals, Phases(warmup_s=3.0, window_s=15.0))
    found = simulated(setup(), planned)
    assert len(found["TTFT"]) == sum(each.part == "window" for each in planned) == 7
    assert found["TTFT"] == pytest.approx([0.206] * 7, rel=0.02)
    records = [
        Record(
            run=1, rate=0.5, index=each.index, part=each.part, outcome="finished",
            scheduled_s=each.arrival.at_s, sent_s=each.arrival.at_s,
            ended_s=each.arrival.at_s + 1, ttft_s=0.2, itl_s=(0.012,) * 10, prompt_tokens=200,
            asked_tokens=11, output_tokens=11,
        )
        for each in planned
    ]  # fmt: skip
    run = Run(
        number=1, rate=0.5, records=tuple(records), metrics=metrics(records, Slo(), began_s=0.0)
    )
    rows = {row.row: row for row in rows_of(run, found)}
    assert set(rows) == {
        f"0.5 requests/s, {name} p{percentile}"
        for name in ("TTFT", "TPOT")
        for percentile in (50, 90)
    }
    assert rows["0.5 requests/s, TTFT p90"].ours == pytest.approx(200)
    assert rows["0.5 requests/s, TTFT p90"].peer == pytest.approx(206, rel=0.02)
