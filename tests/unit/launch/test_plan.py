import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.cli import app

LOAD = ("--prompt-tokens", "1500", "--output-tokens", "200", "--rate", "4")
LIMITS = ("--ttft", "500ms", "--tpot", "0.05s")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def on_h100s(*arguments: str) -> Result:
    return invoke("llama-3-70b", "--gpu", "H100", "--gpus", "16", *arguments)


def test_the_best_split_and_the_others_reasons_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    result = on_h100s(*LOAD, *LIMITS, "--json", str(path))
    assert result.exit_code == 0, result.output
    said = result.stdout
    for part in ("goodput", "KV transfer", "devices are enough", "other layouts", "why not"):
        assert part in said
    assert "twinpool prefill path/to/llama-3-70b --" in said
    figures = json.loads(path.read_text())
    best = figures["best"]
    assert best["devices"] <= 16
    assert best["prefill"]["kv_tokens_per_instance"] > 1500
    assert best["at_rate"]["attainment"] > 0.9
    assert figures["slo"] == {"ttft_s": 0.5, "tpot_s": 0.05, "attainment": 0.9}
    assert figures["device"]["source"]
    assert all(loser["reason"] for loser in figures["losers"])


def test_a_model_that_does_not_run_here_is_planned_without_commands() -> None:
    result = invoke("bloom-176b", "--gpu", "H100", "--gpus", "16", *LOAD, *LIMITS)
    assert result.exit_code == 0, result.output
    assert "twinpool does not compute this architecture with weights of 16 bits" in result.stdout
    assert "twinpool decode" not in result.stdout


def test_instances_of_a_model_that_runs_here_come_with_their_commands(tmp_path: Path) -> None:
    sizes = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 25600,
        "vocab_size": 151936,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    result = invoke(str(tmp_path), "--gpu", "h100", "--gpus", "8", *LOAD, *LIMITS)
    assert result.exit_code == 0, result.output
    assert f"  twinpool prefill {tmp_path} --" in result.stdout
    assert "--max-batch 256 --max-sequences 256" in result.stdout


def test_a_trace_is_planned_for_at_its_own_rate(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": at * 500, "input_length": 1000 + at, "output_length": 100}
        for at in range(100)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    result = on_h100s("--trace", str(trace), *LIMITS, "--losers", "0")
    assert result.exit_code == 0, result.output
    assert "2 requests/s of 1,050 prompt and 100 output tokens" in result.stdout
    assert "other layouts" not in result.stdout
    faster = on_h100s("--trace", str(trace), *LIMITS, "--rate", "5", "--gap-cv", "2")
    assert "5 requests/s of 1,050 prompt" in faster.stdout


def test_a_calibration_can_be_named() -> None:
    result = on_h100s(*LOAD, "--ttft", "2s", "--tpot", "90ms", "--calibration", "splitwise-h100")
    assert result.exit_code == 0, result.output
    assert "fitted to Splitwise's table" in result.stdout
    other = invoke(
        *("llama-3-70b", "--gpu", "h200", "--gpus", "16", *LOAD, *LIMITS),
        *("--calibration", "splitwise-h100"),
    )
    assert (other.exit_code, "is for h100, the plan for h200" in other.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (LIMITS, "give --trace FILE, or all of --prompt-tokens"),
        ((*LIMITS, *LOAD, "--trace", "t.csv"), "leave out --prompt-tokens"),
        ((*LIMITS, "--trace", "no.csv"), "no.csv: cannot be read"),
        ((*LOAD, "--ttft", "1ms", "--tpot", "50ms"), "no prefill layout on 16 x h100 keeps"),
        ((*LOAD, "--ttft", "soon", "--tpot", "50ms"), "'soon' is no time"),
        ((*LOAD, "--ttft", "0ms", "--tpot", "50ms"), "'0ms' is no time above 0"),
        ((*LIMITS, *LOAD, "--attainment", "90"), "--attainment is 90; it must be above 0"),
        ((*LIMITS, *LOAD, "--reserve", "1"), "--reserve is 1; it must be"),
        ((*LIMITS, *LOAD, "--weight-bits", "0"), "--weight-bits is 0"),
        ((*LIMITS, *LOAD, "--rate", "nan"), "--rate is nan"),
        ((*LIMITS, *LOAD, "--gap-cv", "nan"), "--gap-cv is nan"),
        ((*LIMITS, *LOAD, "--calibration", "none"), "calibration none: No such file"),
        ((*LIMITS, *LOAD, "--json", "no/such/folder"), "--json: cannot write no/such/folder"),
    ],
)
def test_what_cannot_be_planned_is_a_usage_error(arguments: tuple[str, ...], message: str) -> None:
    result = on_h100s(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_models_and_devices_that_are_not_known_are_usage_errors() -> None:
    for model, gpu, message in (
        ("no-such", "h100", "no such file"),
        ("llama-3-8b", "h900", "no device 'h900' is known"),
        ("bloom-176b", "a100-40gb", "fits into no prefill layout on 2 x a100-40gb"),
    ):
        result = invoke(model, "--gpu", gpu, "--gpus", "2", *LOAD, *LIMITS)
        assert result.exit_code == 2
        assert message in result.stderr
