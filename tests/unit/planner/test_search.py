import itertools
from dataclasses import replace

import pytest

from planner.calibration import assumed
from planner.errors import HardwareError, NoPlanError, ShapeError
from planner.expected import expect
from planner.hardware import devices, find_device
from planner.layout import Layout, Role
from planner.models import find_model, published
from planner.options import Question, options
from planner.pools import Slo
from planner.report import figures, outcome_lines, why_lost
from planner.search import Plan, plan
from planner.shape import Experts
from planner.workload import steady

QUESTION = Question(
    shape=published()["llama-3-70b"],
    device=find_device("h100"),
    devices=16,
    workload=steady(1500, 200, 4.0),
    slo=Slo(ttft_s=0.5, tpot_s=0.05, attainment=0.9),
    calibration=assumed("h100"),
)


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(QUESTION)


def test_the_best_split_is_the_best_of_all_pairs(found: Plan) -> None:
    kv_bytes = 1500 * QUESTION.shape.kv_token_bytes
    best = 0.0
    pools = [
        [
            (option.layout.ranks * count, goodput)
            for option in options(QUESTION, role)
            for count, goodput in enumerate(option.goodput, start=1)
        ]
        for role in Role
    ]
    for (prefills, prefill), (decodes, decode) in itertools.product(*pools):
        if prefills + decodes <= 16:
            network = min(prefills, decodes) * 50e9 * 0.8 / kv_bytes
            best = max(best, min(prefill, decode, network) / (prefills + decodes))
    assert found.best.goodput_per_device == pytest.approx(best)
    assert found.best.devices <= 16


def test_the_goodput_is_the_rate_at_which_the_share_in_time_is_just_kept(found: Plan) -> None:
    share = QUESTION.slo.share_of_each
    assert share == pytest.approx(0.95)
    for instances in (found.best.prefill, found.best.decode):
        pool = instances.option.pool
        assert pool is not None
        kept = pool.attainment(instances.goodput * 0.999, instances.count)
        missed = pool.attainment(instances.goodput * 1.01, instances.count)
        assert missed < share <= kept
    assert expect(QUESTION, found.best).attainment >= 0.9


def test_the_smallest_split_sustains_the_rate_with_no_more_devices(found: Plan) -> None:
    assert found.smallest is not None
    assert found.smallest.goodput >= QUESTION.workload.rate_per_s
    assert found.smallest.devices <= found.best.devices


def test_every_layout_wins_or_loses_with_a_reason(found: Plan) -> None:
    every = [option for role in Role for option in options(QUESTION, role)]
    assert len(found.losers) == len(every) - 2
    reasons = {(loser.role, loser.layout): why_lost(found, loser) for loser in found.losers}
    assert all(reasons.values())
    assert "weights need 131.4 GiB a device" in reasons[Role.DECODE, Layout()]
    assert "weights need 131.4 GiB" in reasons[Role.PREFILL, Layout(cp=16)]
    assert reasons[Role.DECODE, Layout(tp=16)] == "leaves too few devices to the other pool"
    assert "a step of one sequence takes" in reasons[Role.DECODE, Layout(pp=8)]
    assert "a device, not" in reasons[Role.DECODE, Layout(tp=8)]


def test_layouts_whose_room_is_less_than_the_longest_request_are_refused() -> None:
    long = replace(
        QUESTION,
        workload=steady(100_000, 200, 0.1),
        slo=Slo(ttft_s=60, tpot_s=0.05, attainment=0.9),
    )
    by_layout = {option.layout: option for option in options(long, Role.DECODE)}
    assert "the longest request has 100,200" in (by_layout[Layout(tp=2)].reason or "")
    assert by_layout[Layout(tp=4)].reason is None


def test_a_rate_beyond_all_devices_is_planned_and_said_to_be_too_high() -> None:
    too_much = plan(replace(QUESTION, workload=steady(1500, 200, 500.0)))
    assert too_much.smallest is None
    assert any(line.startswith("NOT ENOUGH: 500") for line in outcome_lines(too_much))
    at = expect(too_much.question, too_much.best)
    assert (at.attainment, at.prefill_mean_wait_s) == (0.0, None)


def test_a_slow_network_binds() -> None:
    slow = QUESTION.device.model_copy(update={"network_bytes_per_s": 0.05e9})
    bound = plan(replace(QUESTION, device=slow))
    assert bound.best.bound_by == "the network"
    needed = figures(bound)["best"]["at_rate"]["transfer_bytes_per_s"]
    assert needed == pytest.approx(4.0 * 1500 * QUESTION.shape.kv_token_bytes)


def test_tighter_limits_and_burstier_arrivals_leave_less_goodput(found: Plan) -> None:
    tight = plan(replace(QUESTION, slo=Slo(ttft_s=0.2, tpot_s=0.02, attainment=0.99)))
    bursty = plan(replace(QUESTION, workload=steady(1500, 200, 4.0, gap_scv=20.0)))
    assert tight.best.goodput_per_device < 0.8 * found.best.goodput_per_device
    assert bursty.best.goodput_per_device < found.best.goodput_per_device


def test_answers_of_one_token_never_keep_decode_busy() -> None:
    short = plan(replace(QUESTION, workload=steady(1500, 1, 4.0)))
    assert short.best.bound_by == "prefill"
    assert expect(short.question, short.best).decode_batch == pytest.approx(0.0, abs=1e-6)


def test_experts_may_be_split_over_ranks_with_sequences_of_their_own() -> None:
    sparse = replace(
        QUESTION.shape, experts=Experts(count=64, top_k=4, inner=3584, layers=80), inner=14336
    )
    layouts = {option.layout for option in options(replace(QUESTION, shape=sparse), Role.DECODE)}
    assert Layout(dp=8, ep=8) in layouts
    dense = {option.layout for option in options(QUESTION, Role.DECODE)}
    assert all(layout.dp == layout.ep == 1 for layout in dense)


def test_layouts_without_any_room_for_waits_are_refused() -> None:
    workload = replace(QUESTION.workload, prompts=(100.0,) * 19 + (60_000.0,))
    tight = replace(QUESTION, workload=workload)
    by_layout = {option.layout: option for option in options(tight, Role.PREFILL)}
    only = by_layout[Layout(tp=4)]
    assert (only.reason, only.goodput) == ("95% are in time only without any load", ())


# ---- what cannot be


def test_limits_that_nothing_keeps_are_refused_with_the_nearest() -> None:
    with pytest.raises(NoPlanError, match=r"no prefill layout .* the nearest is .*raise --ttft"):
        plan(replace(QUESTION, slo=Slo(ttft_s=0.001, tpot_s=0.05, attainment=0.9)))
    with pytest.raises(
        NoPlanError, match=r"no decode layout .* the nearest is tp8: .*raise --tpot"
    ):
        plan(replace(QUESTION, slo=Slo(ttft_s=0.5, tpot_s=0.001, attainment=0.9)))


def test_a_model_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(
        NoPlanError, match=r"llama-3-70b fits into no prefill layout on 2 x a100-40"
    ):
        plan(replace(QUESTION, device=find_device("A100-40GB"), devices=2))


def test_too_few_devices_for_both_pools_are_refused() -> None:
    with pytest.raises(NoPlanError, match=r"too few for both pools: .* give --gpus 4 or more"):
        plan(replace(QUESTION, devices=2, slo=Slo(ttft_s=5, tpot_s=0.5, attainment=0.9)))


def test_an_unknown_device_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(HardwareError, match=r"no device 'h900' is known; use one of a100-40gb, .*"):
        find_device("h900")
    assert all(device.source for device in devices().values())
    assert find_device("CPU").name == "cpu-2core"


def test_an_unknown_model_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ShapeError, match=r"no-such: no such file; .*llama-3-70b"):
        find_model("no-such")
