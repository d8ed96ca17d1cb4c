"""Matrix products with constant weights on the CPU. Owns the packed weights it makes.

In bf16 the order of a weight decides. With AVX512-BF16 it is product_cpu.cpp's, which on 2 cores
of an EPYC took 0.5 to 0.7 of oneDNN's time at 1 to 4 rows, where memory is the limit, 0.6 at 16
rows and 0.95 at 512. Where there is AMX, or no compiler, it is oneDNN's own blocked order, by the
operator that torch's compiler uses for frozen weights: less than half of the time of the plain
order at one row, 0.95 at 512.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.attention_native import CPU_FLAGS
from engine.kernels.fixed import FixedProduct
from native import OPENMP, cpu_flags, load_if_possible

_ops = torch.ops.mkldnn
_SOURCE = Path(__file__).with_name("product_cpu.cpp")
PANEL = 64  # as in product.h
# Multiplications, of a row or of several, below which waking another thread costs more than it
# brings: about 20 us.
_THREADED = 1 << 18
_AMX = "amx_bf16"  # oneDNN's products with it are several times as fast


class NativeProduct:
    """x @ weight.T with the weight in panels; the plain one may be dropped.

    Attributes:
        panels_PIC: [P, I / 2, 64, 2]: 64 outputs side by side, zeros to fill up the last panel.
    """

    def __init__(self, run: Callable[..., Any], weight_OI: Tensor) -> None:
        self._run = run
        self.outputs, self.inner = weight_OI.shape
        whole = F.pad(weight_OI, (0, 0, 0, -self.outputs % PANEL))
        self.panels_PIC = whole.view(-1, PANEL, self.inner // 2, 2).transpose(1, 2).contiguous()

    def __call__(self, x_TI: Tensor) -> Tensor:
        x_TI = x_TI.contiguous()
        rows = len(x_TI)
        assert x_TI.shape == (rows, self.inner)
        assert x_TI.dtype == torch.bfloat16
        y_TO = x_TI.new_empty(rows, self.outputs)
        threaded = max(rows, 2) * self.outputs * self.inner > _THREADED
        self._run(
            *(x_TI.data_ptr(), self.panels_PIC.data_ptr(), y_TO.data_ptr()),
            *(rows, self.inner, self.outputs),
            torch.get_num_threads() if threaded else 1,
        )
        return y_TO


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


def product(
    weight_OI: Tensor, *, deterministic: bool = False
) -> NativeProduct | PackedProduct | PlainProduct | FixedProduct:
    """Return the fastest product with this weight; see `ProductKernel`.

    With `deterministic` of those that give a row the same whatever other rows there are.
    """
    is_bf16 = weight_OI.dtype == torch.bfloat16
    # Inner dimensions are multiplied in pairs.
    if is_bf16 and weight_OI.shape[1] % 2 == 0 and (deterministic or _AMX not in cpu_flags()):
        run = _native()
        if run is not None:
            return NativeProduct(run, weight_OI)
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    packed = is_bf16 and available and _ops._is_mkldnn_bf16_supported()
    made = PackedProduct(weight_OI) if packed else PlainProduct(weight_OI)
    if deterministic:
        return FixedProduct(made, weight_OI)
    return made


def _native() -> Callable[..., Any] | None:
    otherwise = "matrix products are oneDNN's"
    compiled = load_if_possible(_SOURCE, CPU_FLAGS, OPENMP, otherwise)
    if compiled is None:
        return None
    run = compiled.twinpool_product
    run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_int]
    run.restype = None
    return run
