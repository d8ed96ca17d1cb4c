"""Figures, the search for a rate, arrivals, and instances as they are written."""

import math

import pytest

from planner.calibration import assumed
from planner.costs import Chunk, RooflineCosts
from planner.hardware import find_device
from planner.layout import Layout, Role
from planner.models import find_model
from planner.pools import Slo
from planner.simulator.arrivals import at_random, at_rate, rate_of, repeated
from planner.simulator.calls import Call
from planner.simulator.outcome import highest_rate, outcome
from planner.simulator.sizing import Instances, SetupError, Sizing, parse_instances
from planner.simulator.tabled import TabledCosts
from planner.traces import Request

SLO = Slo(ttft_s=1.0, tpot_s=0.1, attainment=0.9)


def call(ttft_s: float, tpot_s: float, output_tokens: int = 11) -> Call:
    return Call(
        at_s=5.0,
        prompt_tokens=10,
        output_tokens=output_tokens,
        first_at=5.0 + ttft_s,
        ended_at=5.0 + ttft_s + tpot_s * (output_tokens - 1),
    )


def test_figures_count_what_was_refused_as_missed() -> None:
    refused = Call(at_s=5.5, prompt_tokens=10, output_tokens=5, refused="QUEUE_FULL")
    found = outcome(
        [call(0.5, 0.05), call(2.0, 0.05), call(0.5, 0.2), call(0.5, 0.0, 1), refused], SLO, 2.0
    )
    assert (found.submitted, found.finished, found.refused) == (5, 4, {"QUEUE_FULL": 1})
    assert found.attainment == 2 / 5
    assert found.duration_s == pytest.approx(2.5)
    assert found.goodput == pytest.approx(2 / 2.5)
    assert found.ttft_s[50] == pytest.approx(0.5)
    assert found.tpot_s[50] == pytest.approx(0.05)


@pytest.mark.parametrize("limit", [0.7, 1.0, 13.0])
def test_the_highest_rate_is_found_from_below(limit: float) -> None:
    found = highest_rate(lambda rate: rate <= limit, start=1.0)
    assert found is not None
    assert limit / 1.03 <= found <= limit


def test_no_rate_is_found_where_none_attains() -> None:
    assert highest_rate(lambda _: False, start=1.0) is None


def test_a_trace_is_repeated_and_made_faster() -> None:
    trace = [Request(at_s=at_s, prompt_tokens=1, output_tokens=1) for at_s in (0.0, 1.0, 3.0, 9.0)]
    more = repeated(trace, 6)
    assert [request.at_s for request in more] == [0, 1, 3, 9, 12, 13]
    assert rate_of(trace) == pytest.approx(1 / 3)
    faster = at_rate(trace, 2.0)
    assert rate_of(faster) == pytest.approx(2.0)
    assert faster[2].at_s == pytest.approx(0.5)


def test_arrivals_at_random_are_those_of_their_seed() -> None:
    first = at_random(1000, 5, 6, 10.0, seed=1)
    assert first == at_random(1000, 5, 6, 10.0, seed=1) != at_random(1000, 5, 6, 10.0, seed=2)
    assert rate_of(first) == pytest.approx(10, rel=0.1)


def test_instances_are_written_with_their_layout() -> None:
    found = parse_instances("2xtp4pp2", Role.PREFILL)
    assert found == Instances(count=2, layout=Layout(tp=4, pp=2))
    assert found.devices == 16
    for text in ("tp4", "0xtp1", "2xtp4tp2", "2xdp4", "2x", "2 x tp4"):
        with pytest.raises(SetupError, match="names no prefill instances"):
            parse_instances(text, Role.PREFILL)


def test_what_does_not_fit_is_refused() -> None:
    sizing = Sizing(
        shape=find_model("llama-3-70b"), device=find_device("h100"), calibration=assumed("h100")
    )
    with pytest.raises(SetupError, match="tp1 on h100: weights need 131"):
        sizing.prefills(Instances(count=1, layout=Layout()), max_batched_tokens=2048)
    with pytest.raises(SetupError, match="tp 3 does not divide"):
        sizing.decodes(Instances(count=1, layout=Layout(tp=3)), max_batch=64)
    with pytest.raises(SetupError, match="--chunk-tokens is 64"):
        sizing.decodes(Instances(count=1, layout=Layout(tp=4)), max_batch=64, chunk_tokens=64)
    assert sizing.decodes(Instances(count=2, layout=Layout(tp=4)), max_batch=64).instances == 2


def test_times_of_the_table_are_those_of_the_roofline() -> None:
    costs = RooflineCosts(
        shape=find_model("llama-3-8b"),
        layout=Layout(),
        device=find_device("a100"),
        calibration=assumed("a100-80gb"),
    )
    table = TabledCosts(costs)
    for batch in (1, 7, 64, 256):
        for mean in (1, 3, 100, 1500, 12_345):
            exact = costs.decode_step_s(batch, batch * mean)
            assert table.decode_step_s(batch, batch * mean) == pytest.approx(exact, rel=0.01)
    chunks = [Chunk(300, 20), Chunk(20)]
    assert table.prefill_s(chunks) == costs.prefill_s(chunks)
    assert table.transfer_s(100) == costs.transfer_s(100)
    assert not math.isnan(table.mixed_step_s(chunks, 3, 900))
