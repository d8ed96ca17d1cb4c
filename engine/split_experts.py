"""The layers of a rank whose experts are split over ranks: what is measured, moved and counted.

Owns no weights; the layers do. Calls are the step loop's, between passes, but where it says so.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.dispatch import Dispatch, Dispatcher, ExpertMap
from engine.errors import UnsupportedError
from engine.kernels.experts import Put
from engine.layers.layer import Placement
from engine.layers.moe import SparseMLP
from engine.parallel import Layout
from engine.weights import Fill


class SplitExperts:
    """The sparse layers of a stage, by number; none of a dense model.

    `dispatch` is None where every rank has a part of all experts, by tp alone.
    """

    def __init__(
        self, layers: Mapping[int, SparseMLP], placement: Placement, hidden_size: int
    ) -> None:
        self.dispatch: Dispatch | None = placement.dispatch
        self._layers = layers
        self._dtype, self._device = placement.dtype, placement.device
        self._hidden_size = hidden_size

    @torch.inference_mode()
    def measure(self, most_rows: int) -> None:
        """Time the dispatchers for steps of up to `most_rows` tokens of a dp rank, and choose.

        All ranks call it, before any sequence runs; it takes a few seconds. Does nothing where
        the choice is set, or where this stage has no experts.
        """
        if self.dispatch is None or not self._layers:
            return
        layer = next(iter(self._layers.values()))

        def trial(dispatcher: Dispatcher, rows: int) -> Callable[[], object]:
            return layer.trial(dispatcher, self._random(rows))

        self.dispatch.measure(trial, most_rows)
        self.take_loads()  # those were not requests'

    @torch.inference_mode()
    def place(self, maps: Mapping[int, ExpertMap]) -> None:
        """Route by other maps, by layer, from the next pass on; layers of other stages are left.

        All ranks call it between the same passes. Raises UnsupportedError, and changes nothing,
        where a layer's slots on this rank do not hold what its map says.
        """
        found = [(mlp, maps[layer]) for layer, mlp in self._layers.items() if layer in maps]
        for mlp, experts in found:
            mlp.check(experts)
        for mlp, experts in found:
            mlp.place(experts)

    @torch.inference_mode()
    def stage(self, layer: int, expert: int, fill: Fill) -> Put:
        """Get an expert's weights ready for a slot; see engine.layers.moe.SparseMLP.stage.

        From any thread.
        """
        return self._layers[layer].stage(expert, fill)

    @torch.inference_mode()
    def put(self, layer: int, slot: int, expert: int, staged: Put) -> None:
        """Replace what a slot of this rank holds; see engine.layers.moe.SparseMLP.put."""
        self._layers[layer].put(slot, expert, staged)

    def held(self, layer: int) -> tuple[int, ...] | None:
        """Return the experts in this rank's slots; None of a layer that is not in its stage."""
        return self._layers[layer].held if layer in self._layers else None

    @torch.inference_mode()
    def take_loads(self) -> dict[int, Tensor]:
        """Return how many tokens chose each expert since the last call, [E] int64, by layer.

        Zeros where there is no dispatcher. Every token is counted on one of the ranks that share
        the experts: the instance's loads are the sum over them.
        """
        return {layer: mlp.take_loads() for layer, mlp in self._layers.items()}

    def _random(self, rows: int) -> Tensor:
        """Return different rows, so that all experts have something to do."""
        generator = torch.Generator().manual_seed(rows)
        x_TD = torch.randn(rows, self._hidden_size, generator=generator)
        return x_TD.to(self._device, self._dtype)


def check_redundant(experts: int, layout: Layout, config: ModelConfig) -> None:
    """Raise UnsupportedError where no rank can have `experts` more than its own."""
    if experts and (layout.ep == 1 or config.moe is None):
        raise UnsupportedError(
            f"redundant_experts={experts} with ep={layout.ep}: use 0, or ep of 2 or more for a "
            "model with experts"
        )
