"""What is done to rows between products, on a GPU.

Legend: as engine.kernels.rows. Sums and functions are fp32; each result is rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu import insert
from engine.kernels.gpu.runtime import check_rows, padded
from engine.kernels.rows import NormWeight, TorchRows

_GATED_TILE = 1024


@triton.jit
def _norm_kernel(
    x,
    more,
    weight,
    out,
    x_t,
    more_t,
    out_t,
    floor_squared,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ADDS: tl.constexpr,
):
    # 64 bits: a pass of many tokens has more elements than an int32 counts.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    inside = columns < SIZE
    value = tl.load(x + row * x_t + columns, mask=inside, other=0.0)
    if ADDS:
        value += tl.load(more + row * more_t + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + row * x_t + columns, value, mask=inside)
    length = tl.sqrt(tl.sum(value * value, 0) + floor_squared)
    scaled = value / length * tl.load(weight + columns, mask=inside, other=0.0)
    tl.store(out + row * out_t + columns, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_kernel(gate_up, out, gate_up_t, out_t, SIZE: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < SIZE
    gate = tl.load(gate_up + row * gate_up_t + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_t + SIZE + columns, mask=inside, other=0.0)
    # exp of a negative number alone, so that no gate overflows.
    shrunk = tl.exp(-tl.abs(gate))
    sigmoid = tl.where(gate >= 0, 1.0, shrunk) / (1.0 + shrunk)
    product = gate * sigmoid * up.to(tl.float32)
    tl.store(out + row * out_t + columns, product.to(out.dtype.element_ty), mask=inside)


class TritonRows(TorchRows):
    """See `RowKernels`. Rows may be parts of wider ones; a row is the same whatever others are."""

    def norm(self, x_TD: Tensor, more_TD: Tensor | None, norm: NormWeight) -> Tensor:
        """See `RowKernels`."""
        added_TD = x_TD if more_TD is None else more_TD
        check_rows(x_TD, added_TD, norm.weight)
        rows, size = x_TD.shape
        out_TD = torch.empty((rows, size), dtype=self._dtype, device=x_TD.device)
        if out_TD.numel():
            tile = padded(size)
            _norm_kernel[(rows,)](
                x_TD,
                added_TD,
                norm.weight,
                out_TD,
                x_TD.stride(0),
                added_TD.stride(0),
                out_TD.stride(0),
                norm.floor_squared,
                SIZE=size,
                TILE=tile,
                ADDS=more_TD is not None,
                num_warps=min(16, max(1, tile // 512)),
            )
        return out_TD

    def norm_rotate(
        self, x_TMH: Tensor, norm: NormWeight, cos_T1H: Tensor, sin_T1H: Tensor
    ) -> None:
        """See `RowKernels`."""
        insert.norm_rotate(x_TMH, norm, cos_T1H, sin_T1H)

    def insert(self, cells: Tensor, slots_TX: Tensor, x_TXH: Tensor) -> None:
        """See `RowKernels`; but heads whose slot is none are left out, since telling would wait."""
        insert.insert(cells, slots_TX, x_TXH)

    def gated(self, gate_up: Tensor) -> Tensor:
        """See `RowKernels`."""
        check_rows(gate_up)
        *rows, both = gate_up.shape
        flat = gate_up.reshape(-1, both)
        out = gate_up.new_empty(len(flat), both // 2)
        if out.numel():
            tile = min(_GATED_TILE, padded(both // 2))
            grid = len(flat), triton.cdiv(both // 2, tile)
            _gated_kernel[grid](flat, out, flat.stride(0), out.stride(0), SIZE=both // 2, TILE=tile)
        return out.view(*rows, both // 2)
