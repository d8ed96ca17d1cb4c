"""Compute that differs between devices, and the tables that pick it.

Owns the seams: attention takes a layer's queries and the batch's indices, a product its
weight, rows what becomes of them between products; none knows of models.

What is asked for as `deterministic` gives a token the same bits whatever else is in the batch.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import Batch
from engine.errors import UnsupportedError
from engine.kernels import (
    argmax_cpu,
    attention_cpu,
    experts_cpu,
    linear_cpu,
    router_cpu,
    rows_cpu,
    step_cpu,
)
from engine.kernels.experts import Experts, ExpertsKernel
from engine.kernels.rows import RowKernels
from engine.kernels.step import Product, StepKernel
from engine.kernels.table import paged_kernels

__all__ = [
    "AttentionKernel",
    "Product",
    "ProductKernel",
    "RowKernels",
    "argmax_kernel",
    "attention_kernel",
    "experts_kernel",
    "product_kernel",
    "router_kernel",
    "row_kernels",
    "step_kernel",
]


class AttentionKernel(Protocol):
    """Causal attention of a pass's new tokens over all tokens of their sequences."""

    def __call__(
        self, qkv_TNH: Tensor, cache_runs: Tensor, batch: Batch, num_heads: int, /
    ) -> Tensor:
        """Return [T, num_heads * H].

        `qkv_TNH` holds the query heads, scaled already, then the K and the V heads of the new
        tokens, which are in `cache_runs` (one layer of `KVCache.runs`) already. Where the batch
        is of decode groups alone, the query heads are enough.
        """
        ...


ProductKernel = Callable[[Tensor], Product]  # a constant weight [O, I] -> x [T, I] -> [T, O]


def _rows_of_gpus(dtype: torch.dtype, *, deterministic: bool = False) -> RowKernels:
    if deterministic:
        raise UnsupportedError("no deterministic kernels for the device cuda; there are: cpu")
    return paged_kernels(torch.device("cuda")).rows(dtype)


_ATTENTION: Mapping[str, Callable[..., AttentionKernel]] = {"cpu": attention_cpu.attention}
_PRODUCT: Mapping[str, Callable[..., Product]] = {"cpu": linear_cpu.product}
_ROUTER: Mapping[str, Callable[..., Product]] = {"cpu": router_cpu.router}
_EXPERTS: Mapping[str, Callable[..., Experts]] = {"cpu": experts_cpu.experts}
_ROWS: Mapping[str, Callable[..., RowKernels]] = {"cpu": rows_cpu.rows, "cuda": _rows_of_gpus}
_ARGMAX: Mapping[str, Callable[[], Callable[[Tensor], list[int]]]] = {"cpu": argmax_cpu.finder}
_STEP: Mapping[str, StepKernel] = {"cpu": step_cpu.step}


def attention_kernel(device: torch.device, *, deterministic: bool = False) -> AttentionKernel:
    """Return the attention of a device; raises UnsupportedError where there is none.

    What has to be compiled is compiled here, so that no pass waits for it.
    """
    return _ATTENTION[_supported(device)](deterministic=deterministic)


def product_kernel(device: torch.device, *, deterministic: bool = False) -> ProductKernel:
    """Return what makes products on a device; raises UnsupportedError where there is nothing."""
    return partial(_PRODUCT[_supported(device)], deterministic=deterministic)


def router_kernel(
    device: torch.device, dtype: torch.dtype, *, deterministic: bool = False
) -> ProductKernel:
    """Return what makes routers' scores of rows of this dtype; raises UnsupportedError."""
    return partial(_ROUTER[_supported(device)], dtype=dtype, deterministic=deterministic)


def experts_kernel(device: torch.device, *, deterministic: bool = False) -> ExpertsKernel:
    """Return what makes experts on a device; raises UnsupportedError where there is nothing."""
    return partial(_EXPERTS[_supported(device)], deterministic=deterministic)


def row_kernels(
    device: torch.device, dtype: torch.dtype, *, deterministic: bool = False
) -> RowKernels:
    """Return what is done to rows on a device by a model of this dtype; raises UnsupportedError."""
    return _ROWS[_supported(device, _ROWS)](dtype, deterministic=deterministic)


def argmax_kernel(device: torch.device) -> Callable[[Tensor], list[int]]:
    """Return what finds the greatest of each row of fp32 numbers, [S, V], on a device.

    It is the first of equals, or of NaNs. Raises UnsupportedError where there is nothing.
    """
    return _ARGMAX[_supported(device)]()


def step_kernel(device: torch.device) -> StepKernel:
    """Return what joins layers on a device; raises UnsupportedError where there is nothing."""
    return _STEP[_supported(device)]


def _supported(device: torch.device, kernels: Mapping[str, object] = _ATTENTION) -> str:
    if device.type not in kernels:
        known = ", ".join(kernels)
        raise UnsupportedError(f"no kernels for the device {device.type}; there are: {known}")
    return device.type
