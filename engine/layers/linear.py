"""Matrix products with weights, split by output or by input over tensor-parallel ranks.

Legend: T tokens, I input features, O output features of this rank.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from engine.kernels import Product
from engine.layers.layer import Placement
from engine.weights import WeightSlot


class _Weight:
    """A matrix that is filled while loading, then replaced by the product that it makes."""

    def __init__(self, rows: int, columns: int, placement: Placement) -> None:
        self.loading_OI: Tensor | None = placement.empty(rows, columns)
        self._make_product = placement.make_product

    def reorder(self, order_O: Tensor) -> None:
        assert self.loading_OI is not None
        self.loading_OI = self.loading_OI[order_O]

    def freeze(self) -> Product:
        assert self.loading_OI is not None
        product = self._make_product(self.loading_OI)
        self.loading_OI = None  # the product has its own copy where it needs another order
        return product


class ColumnLinear:
    """Several projections of one input as one product; each rank has a part of every output.

    `outputs` are the projections' checkpoint names (without ".weight"), their output sizes and
    this rank's parts of them. With `biased` each has a bias too.
    """

    def __init__(
        self,
        outputs: Sequence[tuple[str, int, slice]],
        input_size: int,
        placement: Placement,
        *,
        biased: bool = False,
    ) -> None:
        self._outputs = outputs
        self._input_size = input_size
        rows = sum(part.stop - part.start for _, _, part in self._outputs)
        self._weight = _Weight(rows, input_size, placement)
        self.bias_O = placement.empty(rows) if biased else None
        self.product: Product

    def slots(self) -> Iterator[WeightSlot]:
        assert self._weight.loading_OI is not None
        begin = 0
        for name, size, part in self._outputs:
            end = begin + part.stop - part.start
            yield WeightSlot(
                name=f"{name}.weight",
                shape=(size, self._input_size),
                part=(part,),
                target=self._weight.loading_OI[begin:end],
            )
            if self.bias_O is not None:
                bias_O = self.bias_O[begin:end]
                yield WeightSlot(name=f"{name}.bias", shape=(size,), part=(part,), target=bias_O)
            begin = end

    def reorder(self, order_O: Tensor) -> None:
        """Have the outputs in another order; before `prepare`."""
        self._weight.reorder(order_O)
        if self.bias_O is not None:
            self.bias_O = self.bias_O[order_O]

    def prepare(self) -> None:
        self.product = self._weight.freeze()

    def __call__(self, x_TI: Tensor) -> Tensor:
        out_TO = self.product(x_TI)
        return out_TO if self.bias_O is None else out_TO.add_(self.bias_O)


class RowLinear:
    """A projection whose input is split over ranks: their outputs are added up."""

    def __init__(self, name: str, input_size: int, output_size: int, placement: Placement) -> None:
        self._name = name
        self._shape = (output_size, input_size)
        self._part = placement.layout.tensor_part(input_size)
        self._add_up = placement.stream.add_up
        self._weight = _Weight(output_size, self._part.stop - self._part.start, placement)
        self.product: Product

    def slots(self) -> Iterator[WeightSlot]:
        assert self._weight.loading_OI is not None
        yield WeightSlot(
            name=f"{self._name}.weight",
            shape=self._shape,
            part=(slice(None), self._part),
            target=self._weight.loading_OI,
        )

    def prepare(self) -> None:
        self.product = self._weight.freeze()

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self._add_up(self.product(x_TI))
