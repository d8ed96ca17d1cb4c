"""Compute that differs between devices, and the tables that pick it.

Owns the seams: attention takes a layer's queries and the batch's indices, a product its
weight, rows what becomes of them between products; none knows of models.

What is asked for as `deterministic` gives a token the same bits whatever else is in the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import Batch, PrefillSpan
from engine.config_deepseek import LatentConfig
from engine.errors import UnsupportedError
from engine.kernels import (
    argmax_cpu,
    attention_cpu,
    experts_cpu,
    latent_cpu,
    linear_cpu,
    router_cpu,
    rows_cpu,
    step_cpu,
)
from engine.kernels.experts import Experts, ExpertsKernel
from engine.kernels.gpu import passes
from engine.kernels.latent_prompts import LatentWeights
from engine.kernels.rows import RowKernels
from engine.kernels.step import Product, StepKernel
from engine.kernels.table import PagedKernels

__all__ = [
    "AttentionKernel",
    "Draw",
    "Product",
    "ProductKernel",
    "RowKernels",
    "argmax_kernel",
    "attention_kernel",
    "draw_kernel",
    "experts_kernel",
    "has_forms",
    "paged",
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
        is of decode groups alone, and over latents, the query heads are enough.
        """
        ...


class AttendPrompt(Protocol):
    """Causal attention of a prompt's new tokens over latents, with keys and values made first."""

    def __call__(
        self, q_QNK: Tensor, cache_runs: Tensor, span: PrefillSpan, weights: LatentWeights, /
    ) -> Tensor:
        """Return [Q, N, V], each head's values mixed; see `engine.kernels.latent_prompts`.

        What is turned of the queries is scaled already. The cells of all tokens of the span are in
        `cache_runs`.
        """
        ...


# Logits [S, V], temperatures, top-k, top-p, min-p and random numbers [S] -> tokens [S].
Draw = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
ProductKernel = Callable[[Tensor], Product]  # a constant weight [O, I] -> x [T, I] -> [T, O]


@dataclass(frozen=True, kw_only=True)
class _Kernels:
    """A device's; see the functions of the same names."""

    attention: Callable[..., AttentionKernel]
    latent: Callable[..., AttentionKernel]
    prompt: AttendPrompt
    product: Callable[..., Product]
    router: Callable[..., Product]
    experts: Callable[..., Experts]
    rows: Callable[..., RowKernels]
    argmax: Callable[[], Callable[[Tensor], list[int]]]
    draw: Callable[[], Draw | None]
    paged: Callable[[], PagedKernels | None]
    step: StepKernel
    # Whether kernels have forms, each compiled at its first launch, by sizes of what they compute.
    has_forms: bool


_CPU = _Kernels(
    attention=attention_cpu.attention,
    latent=latent_cpu.LatentAttention,
    prompt=latent_cpu.attend_prompt,
    product=linear_cpu.product,
    router=router_cpu.router,
    experts=experts_cpu.experts,
    rows=rows_cpu.rows,
    argmax=argmax_cpu.finder,
    draw=lambda: None,
    paged=lambda: None,
    step=step_cpu.step,
    has_forms=False,
)
_CUDA = _Kernels(
    attention=passes.Attention,
    latent=passes.LatentAttention,
    prompt=passes.attend_prompt,
    product=passes.product,
    router=passes.router,
    experts=passes.Experts,
    rows=passes.rows,
    argmax=passes.argmax_finder,
    draw=passes.draw,
    paged=passes.kernels,
    step=passes.no_step,
    has_forms=True,
)
_KERNELS: dict[str, _Kernels] = {"cpu": _CPU, "cuda": _CUDA}


def attention_kernel(
    device: torch.device, latent: LatentConfig | None = None, *, deterministic: bool = False
) -> AttentionKernel:
    """Return the attention of a device; raises UnsupportedError where there is none.

    With `latent` it is over one cell a token, and gives mixed latents, [T, num_heads * C]. What has
    to be compiled is compiled here, so that no pass waits for it.
    """
    kernels = _of(device)
    if latent is not None:
        return kernels.latent(latent.rank, deterministic=deterministic)
    return kernels.attention(deterministic=deterministic)


def prompt_kernel(device: torch.device) -> AttendPrompt:
    """Return what attends a prompt over latents; raises UnsupportedError where there is nothing."""
    return _of(device).prompt


def product_kernel(device: torch.device, *, deterministic: bool = False) -> ProductKernel:
    """Return what makes products on a device; raises UnsupportedError where there is nothing."""
    return partial(_of(device).product, deterministic=deterministic)


def router_kernel(
    device: torch.device, dtype: torch.dtype, *, deterministic: bool = False
) -> ProductKernel:
    """Return what makes routers' scores of rows of this dtype; raises UnsupportedError."""
    return partial(_of(device).router, dtype=dtype, deterministic=deterministic)


def experts_kernel(device: torch.device, *, deterministic: bool = False) -> ExpertsKernel:
    """Return what makes experts on a device; raises UnsupportedError where there is nothing."""
    return partial(_of(device).experts, deterministic=deterministic)


def row_kernels(
    device: torch.device, dtype: torch.dtype, *, deterministic: bool = False
) -> RowKernels:
    """Return what is done to rows on a device by a model of this dtype; raises UnsupportedError."""
    return _of(device).rows(dtype, deterministic=deterministic)


def argmax_kernel(device: torch.device) -> Callable[[Tensor], list[int]]:
    """Return what finds the greatest of each row of fp32 numbers, [S, V], on a device.

    It is the first of equals, or of NaNs. Raises UnsupportedError where there is nothing.
    """
    return _of(device).argmax()


def draw_kernel(device: torch.device) -> Draw | None:
    """Return what draws tokens on a device, of rows with any filters, as `draw_torch` documents.

    None where torch's operators do. Raises UnsupportedError.
    """
    return _of(device).draw()


def paged(device: torch.device) -> PagedKernels | None:
    """Return the kernels that a device has for parts of attention, such as a ring's.

    None where torch's operators, and compiled code beside them, do. Raises UnsupportedError.
    """
    return _of(device).paged()


def step_kernel(device: torch.device) -> StepKernel:
    """Return what joins layers on a device; raises UnsupportedError where there is nothing."""
    return _of(device).step


def has_forms(device: torch.device) -> bool:
    """Return whether a pass of new sizes may have to wait for a compiler on a device."""
    return _of(device).has_forms


def _of(device: torch.device) -> _Kernels:
    if device.type not in _KERNELS:
        known = ", ".join(_KERNELS)
        raise UnsupportedError(f"no kernels for the device {device.type}; there are: {known}")
    return _KERNELS[device.type]
