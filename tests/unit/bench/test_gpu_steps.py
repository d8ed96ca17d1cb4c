"""The benchmark of whole steps, as far as it goes without a GPU."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import gpu_steps
from bench.gpu_steps import WORKS, Weights, Work, main

TINY = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 32,
    "intermediate_size": 96,
    "vocab_size": 128,
}


def run(command: Callable[..., None], *arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def tiny(work: Work) -> Work:
    """A model of the same architecture that a CPU runs in a moment."""
    moe = work.config.moe and replace(work.config.moe, num_experts=8, intermediate_size=48)
    return replace(work, config=replace(work.config, **TINY, moe=moe))  # type: ignore[arg-type]


def test_without_a_gpu_it_says_so_and_exits_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, output = run(main)
    assert code == 2
    assert "no CUDA device" in output


def test_every_step_of_every_shape_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    works = tuple(replace(tiny(work), steps=((1, 40), (3, 20))) for work in WORKS)
    monkeypatch.setattr(gpu_steps, "WORKS", works)
    file = tmp_path / "steps.json"
    code, output = run(main, "--device", "cpu", "--repeats", "4", "--json", str(file))
    assert code == 0, output
    rows = json.loads(file.read_text())["rows"]
    assert [row["row"] for row in rows] == [
        "8B, dense, 1 x 40 keys",
        "8B, dense, 3 x 20 keys",
        "30B, 3B active, 1 x 40 keys",
        "30B, 3B active, 3 x 20 keys",
    ]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)


def test_bytes_that_a_step_reads_are_those_of_the_published_models() -> None:
    dense, sparse = (work.config for work in WORKS)
    weights = Weights()
    weights._always, weights._of_experts = 10, 1600
    assert weights.read_bytes(dense, 7) == 10
    assert weights.read_bytes(sparse, 1) == pytest.approx(10 + 1600 / 16)
    assert weights.read_bytes(sparse, 10_000) == pytest.approx(1610)
