"""The prefill benchmark from end to end, on small checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bench import checkpoints, prefill
from bench.prefills.layout_pair import KINDS

SMALL = {"layers": 2, "hidden": 64, "kv_heads": 2, "positions": 8192}


def quick(pattern: str, cache: Path, found: Path) -> list[dict[str, Any]]:
    """Run the benchmark as from the command line; returns its rows."""
    app = typer.Typer()
    app.command()(prefill.main)
    arguments = ["--quick", "--rounds", "2", "--rows", pattern, "--json", str(found)]
    result = CliRunner().invoke(app, [*arguments, "--checkpoints", str(cache)])
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(found.read_text())["rows"]
    return rows


@pytest.mark.slow
def test_a_quick_run_measures_prompts_beside_the_limit_and_a_peer(tmp_path: Path) -> None:
    checkpoints.write_moe(checkpoints.kept_at(tmp_path, checkpoints.MOE), **SMALL, experts=8)
    row, served = quick("moe", tmp_path, tmp_path / "figures.json")
    assert row["row"] == "moe, 128 x 16, beside transformers"
    assert all(row[key] > 0 for key in ("ours", "limit", "peer"))
    assert (served["row"], served["peer"]) == ("moe, 128 x 16, served", None)
    assert served["ours"] > 0


@pytest.mark.slow
def test_a_quick_run_measures_every_layout_of_two_ranks(tmp_path: Path) -> None:
    checkpoints.write_dense(checkpoints.kept_at(tmp_path, checkpoints.DENSE), **SMALL)
    rows = quick("layout", tmp_path, tmp_path / "figures.json")
    assert [row["row"].removeprefix("layout, 256 tokens, ") for row in rows] == list(KINDS)
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)


def test_a_quick_run_measures_two_ranks_that_send_what_the_formula_says(tmp_path: Path) -> None:
    checkpoints.write_dense(checkpoints.kept_at(tmp_path, checkpoints.DENSE), **SMALL)
    speed, sent, hidden = quick("ring, 2", tmp_path, tmp_path / "figures.json")
    assert min(speed["ours"], speed["peer"]) > 0
    assert sent["ours"] == pytest.approx(sent["limit"], rel=0.02)
    assert hidden["ours"] < 100
