"""Models and clusters that the integration tests share; each starts once in a run."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.config import load_config
from engine.generate import GenerationRequest, generate
from engine.runner import ModelRunner
from engine.sampling import SamplingParams
from engine.stopping import StopCriteria
from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster
from tests.unit.engine.checkpoints import make_checkpoint

BLOCK = 32


@dataclass(frozen=True)
class Reference:
    """The same engine in this process, one request after another."""

    runner: ModelRunner

    def tokens(self, prompt: list[int], max_new_tokens: int, **sampling: object) -> list[int]:
        """What the model answers."""
        stop = StopCriteria(max_new_tokens=max_new_tokens, ignore_eos=True)
        request = GenerationRequest(
            prompt_ids=prompt,
            sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
            stop=stop,
        )
        [result] = generate(self.runner, [request], max_batched_tokens=2048)
        return list(result.token_ids)


def reference(model: Path) -> Reference:
    """A float32 runner of a model folder."""
    runner = ModelRunner(
        folder=model,
        config=load_config(model),
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_blocks=256,
        block_size=BLOCK,
    )
    return Reference(runner)


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 checkpoint."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("dense"),
        "Qwen3ForCausalLM",
        vocab_size=512,
        max_position_embeddings=8192,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder / name)
    return folder


@pytest.fixture(scope="session", params=["moe", "dense"])
def model(request: pytest.FixtureRequest) -> Path:
    """Both architectures: the built-in checkpoint, and a random dense one."""
    if request.param == "moe":
        return MODEL_DIR
    folder: Path = request.getfixturevalue("dense_model")
    return folder


@pytest.fixture(scope="session")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running system that serves `model` in float32."""
    logs = tmp_path_factory.mktemp("logs")
    flags = ("--dtype", "float32", "--block-size", str(BLOCK))
    with Cluster(model, logs, *flags) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def single(model: Path) -> Reference:
    """The single-process run to compare with."""
    return reference(model)
