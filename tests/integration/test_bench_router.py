"""The router's benchmark from end to end, on few streams."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bench import router


def quick(pattern: str, folder: Path) -> list[dict[str, Any]]:
    """Run the benchmark as from the command line; returns its rows."""
    app = typer.Typer()
    app.command()(router.main)
    found = folder / "figures.json"
    result = CliRunner().invoke(app, ["--quick", "--rows", pattern, "--json", str(found)])
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(found.read_text())["rows"]
    return rows


def test_a_quick_run_measures_streams_and_decisions(tmp_path: Path) -> None:
    found = quick("^24 streams|decision", tmp_path)
    rows = {row["row"]: row["ours"] for row in found}
    assert rows["24 streams, saturation"] > 0
    [limit] = [row["limit"] for row in found if row["row"] == "24 streams, saturation"]
    assert limit > 0
    assert 0 < rows["24 streams, half load, added p50"] <= rows["24 streams, half load, added p99"]
    assert sum(name.startswith("decision") for name in rows) == 4


@pytest.mark.slow
def test_a_quick_run_refuses_what_is_too_much_and_answers_the_rest(tmp_path: Path) -> None:
    rows = {row["row"]: row["ours"] for row in quick("overload", tmp_path)}
    assert rows["overload 10x, goodput"] > 0
    assert rows["overload 10x, time to a refusal, p50"] > 0
