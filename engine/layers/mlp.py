"""The dense gated MLP. Source: Shazeer 2020, arXiv 2002.05202 (SwiGLU).

Legend: T tokens, D hidden size, I inner size of this rank.
"""

from collections.abc import Iterator

from torch import Tensor

from engine.kernels.step import DenseWeights
from engine.layers.layer import Placement
from engine.layers.linear import ColumnLinear, RowLinear
from engine.weights import WeightSlot


class DenseMLP:
    """down(silu(gate(x)) * up(x)); `name` is its place in the checkpoint."""

    def __init__(self, hidden_size: int, inner_size: int, name: str, placement: Placement) -> None:
        self._rows = placement.rows
        part = placement.layout.tensor_part(inner_size)
        self._gate_up = ColumnLinear(
            [(f"{name}.{each}_proj", inner_size, part) for each in ("gate", "up")],
            hidden_size,
            placement,
        )
        self._down = RowLinear(f"{name}.down_proj", inner_size, hidden_size, placement)

    def slots(self) -> Iterator[WeightSlot]:
        yield from self._gate_up.slots()
        yield from self._down.slots()

    def prepare(self) -> None:
        self._gate_up.prepare()
        self._down.prepare()

    def weights(self) -> DenseWeights:
        """Return what a step through all layers needs."""
        return DenseWeights(gate_up=self._gate_up.product, down=self._down.product)

    def __call__(self, x_TD: Tensor, most_rows: int) -> Tensor:
        return self._down(self._rows.gated(self._gate_up(x_TD)))
