"""The decode benchmark from end to end, on small checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bench import checkpoints, decode
from bench.decodes.ours_side import Ours

SMALL = {"layers": 2, "hidden": 64, "kv_heads": 2}


def quick(pattern: str, cache: Path) -> list[dict[str, Any]]:
    """Run the benchmark as from the command line; returns its rows."""
    app = typer.Typer()
    app.command()(decode.main)
    found = cache / "figures.json"
    arguments = ["--quick", "--rounds", "2", "--rows", pattern, "--json", str(found)]
    result = CliRunner().invoke(app, [*arguments, "--checkpoints", str(cache)])
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(found.read_text())["rows"]
    return rows


@pytest.mark.slow
def test_a_quick_run_measures_batches_beside_the_limit_and_a_peer(tmp_path: Path) -> None:
    checkpoints.write_moe(checkpoints.kept_at(tmp_path, checkpoints.MOE), **SMALL, experts=8)
    row, served = quick("moe, batch", tmp_path)
    assert row["row"] == "moe, batch 2 x 40, beside transformers"
    assert all(row[key] > 0 for key in ("ours", "limit", "peer"))
    assert (served["row"], served["peer"]) == ("moe, batch 2 x 40, served", None)
    assert served["ours"] > 0


def test_our_side_decodes_the_whole_batch_in_every_step_and_counts_experts(tmp_path: Path) -> None:
    model = checkpoints.write_moe(tmp_path / "moe", **SMALL, experts=8)
    side = Ours()
    side.open(model=str(model), num_blocks=3 * 2)
    said = side.run(last_tokens=[5, 6, 7], context=20, steps=6)
    assert [tokens for _, tokens in said["steps"]] == [3] * 6
    assert len(said["outside"]) == 5
    assert min(said["outside"]) > 0
    assert side.experts(last_tokens=[5], context=20, steps=6) == {"experts": 4.0}
    assert 4 < side.experts(last_tokens=[5, 6, 7], context=20, steps=6)["experts"] <= 8


@pytest.mark.slow
def test_a_quick_run_measures_how_experts_are_spread_and_the_pause(tmp_path: Path) -> None:
    checkpoints.write_moe(checkpoints.kept_at(tmp_path, checkpoints.MOE), **SMALL, experts=8)
    *spread, pause = quick("balance", tmp_path)
    assert [row["peer_name"] for row in spread] == ["even places"] * 2
    assert all(1 <= row["ours"] < row["peer"] for row in spread)
    assert spread[1]["ours"] <= spread[0]["ours"]
    assert (pause["row"], pause["unit"]) == ("balance, moe, a layer's pause", "ms")
    assert pause["ours"] > 0


@pytest.mark.slow
def test_a_quick_run_measures_what_is_not_the_models_and_the_latency_under_load(
    tmp_path: Path,
) -> None:
    checkpoints.write_dense(checkpoints.kept_at(tmp_path, checkpoints.DENSE), **SMALL)
    overhead, ratio, *percentiles = quick("dense, (overhead|inter)", tmp_path)
    assert (overhead["row"], overhead["unit"]) == ("dense, overhead, batch 2 x 40", "ms")
    assert overhead["ours"] > 0
    assert ratio["row"].endswith("p99/p50")
    middle, high = (row["ours"] for row in percentiles)
    assert 0 < middle <= high
