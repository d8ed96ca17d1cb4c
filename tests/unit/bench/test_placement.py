"""The comparison of placement policies: traces, pools on a virtual clock, figures."""

import gzip
import json
from pathlib import Path

import pytest

from bench.placement.figures import figures, jain
from bench.placement.pools import Replay
from bench.placement.traces import TRACES, Arrival, read
from bench.policies import calls_for, cluster_for, main, measure, plot, rows_of
from router.policies import POLICIES, PolicyName


def traces(folder: Path) -> Path:
    """Small files in the traces' formats."""
    for name in TRACES.values():
        with gzip.open(folder / name, "wt") as file:
            if ".csv" in name:
                file.write("TIMESTAMP,ContextTokens,GeneratedTokens\r\n")
                for second in range(40):
                    file.write(f"2023-11-16 18:15:{second:02}.1234567,{1000 + second},20\r\n")
            else:
                for number in range(40):
                    row = {
                        "timestamp": 1000 * number,
                        "input_length": 1500,
                        "output_length": 20,
                        "hash_ids": [0, number % 4 + 1, number + 10],
                    }
                    file.write(json.dumps(row) + "\n")
    return folder


def test_traces_begin_at_nothing_and_name_full_blocks_alone(tmp_path: Path) -> None:
    folder = traces(tmp_path)
    code = read(folder, "code", 10)
    assert [a.at_s for a in code] == pytest.approx(list(range(10)))
    assert (code[3].prompt_tokens, code[3].output_tokens, code[3].blocks) == (1003, 20, ())
    mooncake = read(folder, "mooncake synthetic", 10)
    assert mooncake[0].at_s == 0.0
    assert {len(a.blocks) for a in mooncake} == {2}


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_request_ends_and_a_replay_can_be_repeated(
    policy: PolicyName, tmp_path: Path
) -> None:
    arrivals = read(traces(tmp_path), "mooncake conversation", 40)
    cluster = cluster_for(arrivals)
    calls = calls_for(arrivals, cluster, 0.6)
    Replay(cluster, POLICIES[policy]()).run(calls)
    assert all(call.ended_at is not None and call.ttft_s > 0 for call in calls)
    assert figures(calls) == measure(arrivals, policy, 0.6)


def test_load_is_what_the_busier_role_has_to_do() -> None:
    arrivals = [Arrival(at_s=float(i), prompt_tokens=7000, output_tokens=2) for i in range(11)]
    cluster = cluster_for(arrivals)
    calls = calls_for(arrivals, cluster, 0.5)
    per_s = sum(1 / speed.token_s for speed in cluster.prefills)
    span_s = calls[-1].arrival.at_s
    assert sum(c.need.prompt_tokens for c in calls) / per_s == pytest.approx(0.5 * span_s)


def test_jains_index_tells_equal_shares_from_unequal_ones() -> None:
    assert jain([0.5, 0.5, 0.5]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([0.0, 0.0]) == 1.0


def test_command_writes_figures_of_every_policy(tmp_path: Path) -> None:
    folder = traces(tmp_path)
    main(traces=folder, json=tmp_path / "f.json", quick=True, plot_file=None, load=0.6, requests=10)
    rows = {row["row"] for row in json.loads((tmp_path / "f.json").read_text())["rows"]}
    assert len(rows) == len(TRACES) * len(POLICIES) * 6
    assert "conv, expected, attainment" in rows


def test_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arrivals = read(traces(tmp_path), "conv", 20)
    found = {("conv", name): measure(arrivals, name, 0.6) for name in POLICIES}
    assert rows_of("conv", "prefix", found["conv", "prefix"])
    plot(found, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 1000
