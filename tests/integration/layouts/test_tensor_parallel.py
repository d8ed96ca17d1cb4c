"""A model split over ranks computes what one rank does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.parallel import Layout
from tests.integration.cluster import ROOT, free_port
from tests.integration.layouts.rank import logits
from tests.unit.engine.checkpoints import make_checkpoint

WORLD = 4
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # 4 query heads over 2 KV heads: tp 4 shares them.
    "dense": ("Qwen3ForCausalLM", {"vocab_size": 211}),
    "tied": ("Qwen3ForCausalLM", {"vocab_size": 512, "tie_word_embeddings": True}),
    "moe": ("Qwen3MoeForCausalLM", {"vocab_size": 300}),
}
CASES = [(model, tp) for model in MODELS for tp in (2, 4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_checkpoint(tmp_path_factory.mktemp(name), architecture, **sizes)
        for name, (architecture, sizes) in MODELS.items()
    }


@pytest.fixture(scope="module")
def computed(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, computed by one group of ranks; by name and rank."""
    out = tmp_path_factory.mktemp("logits")
    cases = [
        {"name": f"{name}-{tp}-{dtype}", "model": str(models[name]), "tp": tp, "dtype": dtype}
        for name, tp in CASES
        for dtype in ("float32", "bfloat16")
    ]
    port = str(free_port())
    command = [sys.executable, "-m", "tests.integration.layouts.rank"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), port, json.dumps(cases), str(out)], cwd=ROOT
        )
        for rank in range(WORLD)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0] * WORLD
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return out


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_fp32_logits_are_those_of_one_rank(
    name: str, tp: int, models: dict[str, Path], computed: Path
) -> None:
    wanted = logits(models[name], Layout(), None, "float32")
    for rank in range(tp):
        found = load_file(computed / f"{name}-{tp}-float32.{rank}")["logits"]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_bf16_error_is_at_most_twice_that_of_one_rank(
    name: str, tp: int, models: dict[str, Path], computed: Path
) -> None:
    truth = logits(models[name], Layout(), None, "float32")
    own = (logits(models[name], Layout(), None, "bfloat16") - truth).square().mean().sqrt()
    found = load_file(computed / f"{name}-{tp}-bfloat16.0")["logits"]
    assert (found - truth).square().mean().sqrt() <= 2 * own
