"""Workloads: traces and their faults, scaling, gaps and lengths at random, tokens of blocks."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.workloads.arrivals import (
    Arrival,
    Phases,
    Planned,
    WorkloadError,
    at_rate,
    plan,
    scaled,
    within_context,
)
from bench.workloads.prompts import Prompts
from bench.workloads.synthetic import arrival_times, lengths
from bench.workloads.traces import read
from bench.workloads.workload import Drawn, Replayed


def mooncake(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(at_ms: float, prompt: int, blocks: list[int], output: int = 20) -> dict[str, Any]:
    return {
        "timestamp": at_ms,
        "input_length": prompt,
        "output_length": output,
        "hash_ids": blocks,
    }


def arrivals(count: int, gap_s: float = 1.0) -> list[Arrival]:
    return [Arrival(at_s=n * gap_s, prompt_tokens=10 + n, output_tokens=5) for n in range(count)]


def test_a_trace_begins_at_nothing_and_keeps_its_blocks(tmp_path: Path) -> None:
    found = read(mooncake(tmp_path, row(3000, 600, [0, 1]), row(4500, 1024, [0, 2])))
    assert [(a.at_s, a.prompt_tokens, a.output_tokens) for a in found] == [
        (0.0, 600, 20),
        (1.5, 1024, 20),
    ]
    assert [a.blocks for a in found] == [(0, 1), (0, 2)]


def test_rounded_times_can_be_spread_and_are_the_same_each_time(tmp_path: Path) -> None:
    path = mooncake(tmp_path, *(row(0, 10, [n]) for n in range(50)))
    spread = read(path, spread_s=3.0)
    assert spread == read(path, spread_s=3.0)
    assert len({each.at_s for each in spread}) == 50
    assert max(each.at_s for each in spread) <= 3.0


def test_a_bad_trace_is_refused_as_a_workload_with_its_line(tmp_path: Path) -> None:
    path = mooncake(tmp_path, row(0, 10, [0]), row(1, 0, []))
    with pytest.raises(WorkloadError, match="line 2: 0 prompt and 20 output tokens"):
        read(path)


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"none\.jsonl: cannot be read"):
        read(tmp_path / "none.jsonl")


def test_requests_that_share_blocks_share_tokens_whatever_their_lengths_are_scaled_to() -> None:
    prompts = Prompts(seed=3, run=1, vocab_size=1000)
    long, short = (
        Arrival(at_s=0, prompt_tokens=tokens, output_tokens=9, blocks=blocks)
        for tokens, blocks in ((1500, (7, 8, 9)), (1100, (7, 8, 5)))
    )
    for scale in (1.0, 0.05, 3.0):
        first, second = (
            prompts.of(Planned(index=index, part="window", arrival=scaled(each, scale)))
            for index, each in enumerate((long, short))
        )
        shared = 2 * round(512 * scale)
        assert len(first) == pytest.approx(1500 * scale, rel=0.02)
        assert (first[:shared] == second[:shared]).all()
        assert (first[shared : shared + 3] != second[shared : shared + 3]).any()


def test_no_scale_leaves_a_request_with_nothing() -> None:
    whole = Arrival(at_s=0, prompt_tokens=513, output_tokens=1, blocks=(1, 2))
    tiny = scaled(whole, 0.001)
    assert (tiny.prompt_tokens, tiny.output_tokens, tiny.block_tokens) == (2, 1, 1)


def test_no_prompt_comes_twice_and_every_run_has_its_own() -> None:
    requests = [Planned(index=n, part="window", arrival=arrivals(1)[0]) for n in range(2)]
    made = [
        tuple(Prompts(seed=0, run=run, vocab_size=5000).of(each).tolist())
        for run in (1, 2)
        for each in requests
    ]
    assert len(set(made)) == 4
    again = Prompts(seed=0, run=1, vocab_size=5000).of(requests[0])
    assert tuple(again.tolist()) == made[0]
    assert max(max(prompt) for prompt in made) < 5000


def test_a_rate_is_met_exactly_and_keeps_the_shape_of_the_gaps() -> None:
    uneven = [Arrival(at_s=at, prompt_tokens=1, output_tokens=1) for at in (0, 1, 4, 5, 10)]
    found = at_rate(uneven, 2.0, 2.0)
    assert [each.at_s for each in found] == pytest.approx([0, 0.2, 0.8, 1.0])
    with pytest.raises(WorkloadError, match="take 6 requests, the workload has 5"):
        at_rate(uneven, 3.0, 2.0)


def test_what_is_too_long_is_left_out_and_times_begin_anew() -> None:
    found = within_context(arrivals(4)[::-1], 16)
    assert [each.tokens for each in found] == [16, 15]
    with pytest.raises(WorkloadError, match="at most 10 tokens, the shortest has 15"):
        within_context(arrivals(4), 10)


def test_only_the_window_counts_and_its_requests_can_be_limited() -> None:
    phases = Phases(warmup_s=2, window_s=3, cooldown_s=1)
    planned = plan(arrivals(10), phases)
    assert [each.part for each in planned] == [
        *["warm-up"] * 2,
        *["window"] * 3,
        "cool-down",
    ]
    assert len(plan(arrivals(10), phases, max_requests=2)) == 4
    with pytest.raises(WorkloadError, match="no request comes in the 3 s"):
        plan(arrivals(2), phases)


def test_gaps_have_the_spread_of_their_burstiness_and_end_at_the_rate() -> None:
    for burstiness in (0.25, 1.0, 4.0):
        times = arrival_times(20_000, 5.0, burstiness, np.random.default_rng(0))
        gaps = np.diff(times)
        assert times[-1] == pytest.approx(20_000 / 5.0)
        # Of a gamma distribution of this shape.
        assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)
    steady = np.diff(arrival_times(10, 4.0, math.inf, np.random.default_rng(0)))
    assert steady == pytest.approx(np.full(9, 0.25))


def test_lengths_are_spread_as_they_are_asked_for() -> None:
    rng = np.random.default_rng(0)
    assert set(lengths("17").draw(rng, 5)) == {17.0}
    uniform = lengths("uniform:10:30").draw(rng, 10_000)
    assert (uniform.min() >= 10, uniform.max() <= 30) == (True, True)
    assert np.median(lengths("lognormal:100:0.5").draw(rng, 10_000)) == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("text", ["", "0", "x", "uniform:5", "uniform:5:2", "normal:1:2", "1:2"])
def test_other_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|below 1"):
        lengths(text)


def test_drawn_requests_keep_rate_and_context_and_are_the_same_each_time() -> None:
    drawn = Drawn(
        prompts=lengths("lognormal:50:1.0"), outputs=lengths("10"), burstiness=1.0, seed=5
    )
    found = drawn.at(10.0, 30.0, 100)
    assert found == drawn.at(10.0, 30.0, 100)
    assert len(found) == 300
    assert max(each.tokens for each in found) <= 100
    assert (found[0].at_s, found[-1].at_s < 30.0) == (0.0, True)
    # The lengths do not depend on the rate.
    assert [a.prompt_tokens for a in drawn.at(5.0, 30.0, 100)] == [
        a.prompt_tokens for a in found[:150]
    ]
    with pytest.raises(WorkloadError, match="none of 1024"):
        drawn.at(1.0, 10.0, 10)


def test_a_replay_has_a_rate_of_its_own_that_can_be_stretched() -> None:
    replayed = Replayed(requests=arrivals(4), time_scale=0.5, length_scale=2.0)
    assert [each.at_s for each in replayed.at(None, 10.0, None)] == [0.0, 0.5, 1.0, 1.5]
    assert [each.prompt_tokens for each in replayed.at(None, 10.0, None)] == [20, 22, 24, 26]
    assert [each.at_s for each in replayed.at(1.0, 2.0, None)] == [0.0, 1.0]
