"""The benchmark of whole models beside transformers, as far as it goes without a GPU."""

import json
from pathlib import Path

import pytest
import torch

from bench import gpu_models
from bench.gpu_models import Transformers, main
from bench.gpu_steps import WORKS, Work
from engine.runner import ModelRunner
from tests.unit.bench.test_gpu_steps import run, tiny

CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so_and_exits_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, output = run(main)
    assert code == 2
    assert "no CUDA device" in output


def test_every_batch_and_prompt_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """But for the peer's continuous batching, which wants a GPU."""
    monkeypatch.setattr(gpu_models, "WORKS", tuple(tiny(work) for work in WORKS))
    monkeypatch.setattr(gpu_models, "BATCHES", ((1, 40), (3, 20)))
    monkeypatch.setattr(gpu_models, "PROMPTS", (33,))
    monkeypatch.setattr(gpu_models, "_CHUNK", 16)
    monkeypatch.setattr(Transformers, "decode", lambda *_: [7.0] * 16)
    file = tmp_path / "models.json"
    code, output = run(main, "--device", "cpu", "--steps", "16", "--json", str(file))
    assert code == 0, output
    rows = json.loads(file.read_text())["rows"]
    assert [row["row"] for row in rows] == [
        f"{name}, {what}"
        for name in ("8B, dense", "30B, 3B active")
        for what in ("decode, 1 x 40 keys", "decode, 3 x 20 keys", "prefill, 33 tokens")
    ]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_both_engines_have_as_many_weights(work: Work) -> None:
    config = tiny(work).config
    counted: list[int] = []
    ModelRunner(
        folder=None,
        config=config,
        dtype=torch.bfloat16,
        device=CPU,
        num_blocks=1,
        block_size=32,
        fill=lambda slots: counted.extend(slot.target.numel() for slot in slots),
    )
    theirs = Transformers(config, CPU)._model
    assert sum(counted) == sum(each.numel() for each in theirs.parameters())
