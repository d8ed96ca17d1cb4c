import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.cli import app

LOAD = ("--prompt-tokens", "800", "--output-tokens", "50", "--requests", "60")
SPLIT = ("--prefill", "2xtp1", "--decode", "1xtp2")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments])


def of_8b(*arguments: str) -> Result:
    return invoke("llama-3-8b", "--gpu", "h100", *arguments)


def test_times_at_each_rate_are_shown_and_written(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    limits = ("--ttft", "500ms", "--tpot", "50ms")
    result = of_8b(*SPLIT, *LOAD, *limits, "--rates", "2,8", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "TPOT p99" in result.stdout
    found = json.loads(file.read_text())
    assert found["devices"] == 4
    assert [rate["rate_per_s"] for rate in found["rates"]] == [2.0, 8.0]
    for rate in found["rates"]:
        assert rate["submitted"] == rate["finished"] == 60
        assert 0 < rate["tpot_s"]["50"] <= rate["tpot_s"]["99"] < 0.05
    again = of_8b(*SPLIT, *LOAD, *limits, "--rates", "2,8", "--json", str(tmp_path / "again.json"))
    assert again.stdout == result.stdout


def test_the_highest_rate_within_the_limits_is_looked_for() -> None:
    result = of_8b(
        *("--colocated", "2xtp1", *LOAD, "--rates", "4"),
        *("--search", "--ttft", "300ms", "--tpot", "30ms"),
    )
    assert result.exit_code == 0, result.output
    assert "90% keep TTFT 300 ms and TPOT 30 ms up to" in result.stdout
    assert "a device of 2" in result.stdout


def test_a_trace_is_replayed_with_a_loss(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": at * 100, "input_length": 500, "output_length": 80} for at in range(50)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    file = tmp_path / "out.json"
    result = of_8b(
        *("--prefill", "1xtp1", "--decode", "2xtp1", "--trace", str(trace)),
        *("--requests", "80", "--lose", "decode:1@3s", "--json", str(file)),
    )
    assert result.exit_code == 0, result.output
    [found] = json.loads(file.read_text())["rates"]
    assert (found["submitted"], found["finished"]) == (80, 80)
    assert found["moved"] > 0
    assert found["rate_per_s"] == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*LOAD, "--rates", "2"), "give --prefill and --decode, or --colocated alone"),
        ((*SPLIT, "--rates", "2"), "give --trace, or --prompt-tokens and --output-tokens"),
        ((*SPLIT, *LOAD, "--trace", "a.csv"), "give --trace, or --prompt-tokens"),
        ((*SPLIT, *LOAD), "--rates: is required without a trace"),
        ((*SPLIT, *LOAD, "--rates", "2", "--search"), "--search: needs limits"),
        ((*SPLIT, *LOAD, "--rates", "2", "--lose", "router@3s"), "--lose: found 'router@3s'"),
        ((*SPLIT, *LOAD, "--rates", "2", "--lose", "decode@3"), "with a unit"),
        ((*SPLIT, *LOAD, "--rates", "2", "--routers", "2"), "2 routers need an instance"),
        (("--colocated", "2xtq1", *LOAD, "--rates", "2"), "'2xtq1' names no decode instances"),
        ((*SPLIT, *LOAD, "--rates", "2", "--policy", "best"), "--policy"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_a_line(
    arguments: tuple[str, ...], said: str
) -> None:
    result = of_8b(*arguments)
    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert "Traceback" not in result.output
