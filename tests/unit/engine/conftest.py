"""Checkpoints and runners that several tests of the engine share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.config import load_config
from engine.runner import ModelRunner
from tests.unit.engine.checkpoints import ARCHITECTURES, DEEPSEEK_V3, LLAMA, make_checkpoint

MakeRunner = Callable[..., ModelRunner]


@pytest.fixture(scope="session", params=(*ARCHITECTURES, LLAMA, DEEPSEEK_V3))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Of other numbers a token may choose other experts by a rounding, which is no error's measure.
    seed = 1 if request.param == DEEPSEEK_V3 else 0
    return make_checkpoint(tmp_path_factory.mktemp("model"), request.param, seed=seed)


@pytest.fixture(scope="session")
def make_runner() -> MakeRunner:
    def make(
        folder: Path,
        dtype: torch.dtype = torch.float32,
        num_blocks: int = 64,
        block_size: int = 8,
    ) -> ModelRunner:
        return ModelRunner(
            folder=folder,
            config=load_config(folder),
            dtype=dtype,
            device=torch.device("cpu"),
            num_blocks=num_blocks,
            block_size=block_size,
        )

    return make


@pytest.fixture
def runner(checkpoint: Path, make_runner: MakeRunner) -> ModelRunner:
    """A runner in fp32 whose cache is full of NaN: nothing may read what was not written."""
    runner = make_runner(checkpoint)
    runner.cache.tensor.fill_(torch.nan)
    return runner
