"""Matrix products with constant weights on the CPU. Owns the packed weights it makes.

oneDNN multiplies faster with weights in its own blocked order: 2.3 times at one row of a
2048 x 2048 bf16 matrix, where memory is the limit, 5% at 512 rows, with equal results. This
is the operator that torch's own compiler uses for frozen weights.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_ops = torch.ops.mkldnn


class PackedProduct:
    """x @ weight.T with the weight in oneDNN's order; the plain one may be dropped."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._packed = _ops._reorder_linear_weight(weight_OI, None)

    def __call__(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = _ops._linear_pointwise(x_TI, self._packed, None, "none", [], "")
        return y_TO


class PlainProduct:
    """x @ weight.T with the weight as it is."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._weight_OI = weight_OI

    def __call__(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self._weight_OI)


def product(weight_OI: Tensor) -> PackedProduct | PlainProduct:
    """Return the fastest product with this weight; see `ProductKernel`."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if available and weight_OI.dtype == torch.bfloat16 and _ops._is_mkldnn_bf16_supported():
        return PackedProduct(weight_OI)
    return PlainProduct(weight_OI)
