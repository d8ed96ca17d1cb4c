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
    # No norms of heads, and biases of them.
    "tied": ("Qwen2ForCausalLM", {"vocab_size": 512, "tie_word_embeddings": True}),
    "moe": ("Qwen3MoeForCausalLM", {"vocab_size": 300}),
    # Without experts, of which a rounding may have a token choose others.
    "latent": ("DeepseekV3ForCausalLM", {"vocab_size": 260, "first_k_dense_replace": 3}),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "cp2": {"cp": 2},
    "cp2 pass-q": {"cp": 2, "mode": "pass-q"},
    "cp3 pass-kv": {"cp": 3, "grain": 32, "mode": "pass-kv"},
    "cp3 gather": {"cp": 3, "mode": "gather"},
    "cp4": {"cp": 4},
    "cp4 coarse": {"cp": 4, "grain": 96},
    "cp2 x tp2": {"cp": 2, "tp": 2},
    "pp2": {"pp": 2},
    "pp3": {"pp": 3},
    "pp2 x cp2": {"pp": 2, "cp": 2},
    "pp2 x tp2": {"pp": 2, "tp": 2},
    "tp2 by rows": {"tp": 2, "sp": True},
    "tp4 by rows": {"tp": 4, "sp": True},
    "cp2 x tp2 by rows": {"cp": 2, "tp": 2, "sp": True},
    "pp2 x tp2 by rows": {"pp": 2, "tp": 2, "sp": True},
}
DEFAULTS: dict[str, Any] = {"tp": 1, "cp": 1, "pp": 1, "grain": 16, "mode": "auto", "sp": False}
CASES = [(model, layout) for model in MODELS for layout in LAYOUTS]


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
        {
            **DEFAULTS,
            **LAYOUTS[layout],
            "name": f"{name}-{layout}-{dtype}",
            "model": str(models[name]),
            "dtype": dtype,
        }
        for name, layout in CASES
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


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_fp32_logits_are_those_of_one_rank(
    name: str, layout: str, models: dict[str, Path], computed: Path
) -> None:
    wanted = logits(models[name], Layout(), "float32")
    split = DEFAULTS | LAYOUTS[layout]
    for rank in range(split["pp"] * split["tp"] * split["cp"]):
        found = load_file(computed / f"{name}-{layout}-float32.{rank}")["logits"]
        if rank < (split["tp"] if split["pp"] == 1 else 1):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        else:
            assert found.shape == (0, wanted.shape[1])


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_bf16_error_is_at_most_twice_that_of_one_rank(
    name: str, layout: str, models: dict[str, Path], computed: Path
) -> None:
    truth = logits(models[name], Layout(), "float32")
    own = (logits(models[name], Layout(), "bfloat16") - truth).square().mean().sqrt()
    found = load_file(computed / f"{name}-{layout}-bfloat16.0")["logits"]
    assert (found - truth).square().mean().sqrt() <= 2 * own
