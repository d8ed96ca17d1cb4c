"""How long a layer's experts take to change places on one of several ranks, between two steps.

The other ranks are not there, and no step runs: what is timed is what a step has to wait for, and
beside it what is read in the background.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.prefills.works import BLOCK_SIZE
from bench.sides.answers import serve
from engine.config import load_config
from engine.dispatch import ExpertMap
from engine.expert_moves import stage, switch
from engine.parallel import Layout
from engine.runner import ModelRunner
from engine.weights import Reader


class Absent:
    """The group of ranks that share experts, of which only this one is there."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rank = 0

    def all_to_all(
        self, x: Tensor, give: Sequence[int] | None = None, take: Sequence[int] | None = None
    ) -> Tensor:
        """See parallel.ExpertGroup."""
        raise NotImplementedError

    def all_gather(self, x: Tensor) -> Tensor:
        """See parallel.ExpertGroup."""
        raise NotImplementedError

    def all_reduce(self, x: Tensor) -> Tensor:
        """See parallel.ExpertGroup."""
        raise NotImplementedError

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See parallel.ExpertGroup."""
        raise NotImplementedError


class Moving:
    """The first of some ranks, each with a part of the experts."""

    def open(self, *, model: str, ranks: int) -> dict[str, Any]:
        """Load the rank's part."""
        self._folder = Path(model)
        config = load_config(self._folder)
        assert config.moe is not None
        self._runner = ModelRunner(
            folder=self._folder,
            config=config,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            num_blocks=1,
            block_size=BLOCK_SIZE,
            layout=Layout(dp=ranks, ep=ranks),
            experts=Absent(ranks),
        )
        self._slots = ExpertMap.even(config.moe.num_experts, self._runner.layout).slots
        self._reader = Reader(self._folder)
        self._experts = self._runner.experts
        self._layer = next(n for n in range(config.num_layers) if self._experts.held(n) is not None)
        return {"version": "ours"}

    def move(self) -> dict[str, Any]:
        """Exchange all experts of this rank with those of the next: answers with the seconds."""
        first, second, *rest = self._slots
        held = self._experts.held(self._layer)
        slots = (second, first, *rest) if held == first else self._slots
        to = ExpertMap(sum(map(len, slots)), slots)
        began_s = time.perf_counter()
        staged = stage(self._experts, 0, self._layer, to, self._reader.fill)
        read_s = time.perf_counter()
        switch(self._experts, staged)
        ended_s = time.perf_counter()
        moved = len(staged.puts)
        return {"experts": moved, "read_s": read_s - began_s, "switch_s": ended_s - read_s}


if __name__ == "__main__":
    side = Moving()
    serve({"open": side.open, "move": side.move})
