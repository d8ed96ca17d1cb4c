"""A runner whose layout leaves the grain open: it is chosen between the weights and the cache."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import load_config
from engine.errors import UnsupportedError
from engine.parallel import Layout
from engine.ring.calibrate import Trial
from engine.ring.comm import Solo, Wire
from engine.runner import Chunk, ModelRunner
from tests.unit.engine.conftest import MakeRunner
from tests.unit.engine.ring.threads import LoopbackComm, on_ranks


def open_runner(
    checkpoint: Path, comm: LoopbackComm, choose_grain: Callable[[Trial], int] | None
) -> ModelRunner:
    """One of two cp ranks, whose layout leaves the grain open."""
    return ModelRunner(
        folder=checkpoint,
        config=load_config(checkpoint),
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_blocks=lambda layout: 96 // layout.cp_grain,
        block_size=8,
        layout=Layout(cp=comm.size, cp_rank=comm.rank),
        ring=Wire(comm),
        choose_grain=choose_grain,
    )


def test_open_grain_is_chosen_by_passes_of_the_loaded_model(
    checkpoint: Path, make_runner: MakeRunner
) -> None:
    def run(comm: LoopbackComm) -> Tensor:
        def choose_grain(trial: Trial) -> int:
            trial(5, Wire(Solo()))()
            over_all = trial(20, Wire(comm))
            over_all()
            over_all()
            return 24

        runner = open_runner(checkpoint, comm, choose_grain)
        assert (runner.layout.cp_grain, runner.block_tokens, runner.num_blocks) == (24, 48, 4)
        assert runner.cache.num_blocks == 12
        assert not runner.cache.tensor.any()
        return runner.forward([Chunk(token_ids=range(1, 61), start=0, block_table=[2, 0])])

    split, _ = on_ranks(2, run)
    chunk = Chunk(token_ids=range(1, 61), start=0, block_table=range(8))
    torch.testing.assert_close(
        split, make_runner(checkpoint).forward([chunk]), rtol=1e-4, atol=1e-4
    )


def test_open_grain_that_nobody_chooses_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UnsupportedError, match="cp=2 needs a grain"):
        on_ranks(2, lambda comm: open_runner(checkpoint, comm, None))
