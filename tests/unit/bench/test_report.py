"""Figures that are shown and kept."""

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from bench import report
from bench.report import GrowingReport, Row, machine

ROW = Row(row="a copy", ours=3.0, unit="GB/s", higher_is_better=True, limit=4.0)


def kept(file: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(file.read_text())["rows"]
    return rows


def test_each_row_is_in_the_file_before_the_next_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    figures = GrowingReport("how fast?", file)
    figures.put(ROW)
    assert [row["row"] for row in kept(file)] == ["a copy"]
    figures.put(replace(ROW, row="another"))
    figures.put(replace(ROW, peer=2.0, peer_name="torch"))
    assert [(row["row"], row["peer"]) for row in kept(file)] == [("a copy", 2.0), ("another", None)]


def test_what_fails_takes_no_other_row_away_and_ends_the_program_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = GrowingReport("how fast?", tmp_path / "figures.json")
    with figures.attempt("first"):
        raise ValueError("no such tile")
    with figures.attempt("second"):
        figures.put(ROW)
    with pytest.raises(typer.Exit) as ended:
        figures.end()
    assert ended.value.exit_code == 1
    said = capsys.readouterr()
    assert "first: FAILED, ValueError: no such tile" in said.err
    assert "a copy" in said.out
    assert len(kept(tmp_path / "figures.json")) == 1


def test_a_file_says_by_which_command_and_on_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "nvidia-smi"
    asked.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.159.04'\n")
    asked.chmod(asked.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nexit 128\n")
    git.chmod(git.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("TWINPOOL_COMMIT", "1234abc")
    monkeypatch.setattr("sys.argv", ["/any/bench/kernels.py", "--rows", "a b"])
    report._gpus.cache_clear()
    try:
        GrowingReport("how fast?", tmp_path / "figures.json").put(ROW)
        assert machine().endswith("; NVIDIA H200, driver 580.159.04")
    finally:
        report._gpus.cache_clear()
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["commit"] == "1234abc"
    assert written["command"] == "kernels.py --rows 'a b'"
    assert written["machine"].endswith("driver 580.159.04")
