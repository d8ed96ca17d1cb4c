"""Puts attention over parts of the keys together. Owns no order and no exchange.

Legend: T query rows, N query heads, C parts, H head size. An LSE is a natural logarithm; rows that
saw no key have -inf, and their output is not read. For the arithmetic see engine.ring.merge.
"""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.runtime import check_grid, check_rows, padded

_TILE_ELEMENTS = 2048
_PARTS = 8  # that a program holds at once


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(
    out,
    lse,
    other,
    other_lse,
    out_t,
    out_n,
    lse_t,
    lse_n,
    other_t,
    other_n,
    other_lse_t,
    other_lse_n,
    rows,
    NUM_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // NUM_HEADS, row % NUM_HEADS
    inside = row < rows
    columns = tl.arange(0, COLUMNS)
    lse_at = lse + token * lse_t + head * lse_n
    mine = tl.load(lse_at, mask=inside, other=float("-inf"))
    theirs = tl.load(
        other_lse + token * other_lse_t + head * other_lse_n, mask=inside, other=float("-inf")
    )
    top = tl.maximum(mine, theirs)
    finite = tl.where(top == float("-inf"), 0.0, top)
    my_weight = tl.exp(mine - finite)
    their_weight = tl.exp(theirs - finite)
    total = my_weight + their_weight
    # At least 1 where either saw a key.
    scale = 1.0 / tl.maximum(total, 1.0)
    valid = inside[:, None] & (columns[None, :] < SIZE)
    out_at = out + (token * out_t + head * out_n)[:, None] + columns[None, :]
    other_at = other + (token * other_t + head * other_n)[:, None] + columns[None, :]
    my_out = tl.load(out_at, mask=valid & (my_weight > 0)[:, None], other=0.0)
    their_out = tl.load(other_at, mask=valid & (their_weight > 0)[:, None], other=0.0)
    merged = my_out * (my_weight * scale)[:, None] + their_out * (their_weight * scale)[:, None]
    tl.store(out_at, merged, mask=valid)
    merged_lse = tl.where(total > 0, finite + tl.log(tl.maximum(total, 1.0)), float("-inf"))
    tl.store(lse_at, merged_lse, mask=inside)


@triton.jit(do_not_specialize=["parts_lse_t", "parts_lse_n", "num_parts"])
def _merge_parts_kernel(
    parts,
    parts_lse,
    out,
    lse,
    parts_t,
    parts_n,
    parts_c,
    parts_lse_t,
    parts_lse_n,
    out_t,
    out_n,
    lse_t,
    lse_n,
    num_parts,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Merge the parts of one row; their LSEs lie side by side."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    lses_at = parts_lse + token * parts_lse_t + head * parts_lse_n
    parts_at = parts + token * parts_t + head * parts_n
    total = tl.zeros([1], tl.float32)
    top = tl.full([1], float("-inf"), tl.float32)
    mixed = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        lses = tl.load(lses_at + part, mask=part < num_parts, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(lses, 0))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(lses - finite)
        shrunk = tl.exp(top - finite)
        # What a part without keys left in memory is undefined.
        valid = (weights > 0)[:, None] & (columns[None, :] < SIZE)
        values = tl.load(
            parts_at + part[:, None] * parts_c + columns[None, :], mask=valid, other=0.0
        )
        mixed = mixed * shrunk + tl.sum(values * weights[:, None], 0)
        total = total * shrunk + tl.sum(weights, 0)
        top = new_top
    divisor = tl.maximum(total, 1.0)
    out_at = out + token * out_t + head * out_n + columns
    tl.store(out_at, (mixed / divisor).to(out.dtype.element_ty), mask=columns < SIZE)
    if HAS_LSE:
        merged_lse = tl.where(total > 0, top + tl.log(divisor), float("-inf"))
        tl.store(lse + token * lse_t + head * lse_n + tl.arange(0, 1), merged_lse)


def merge(out_TNH: Tensor, lse_TN: Tensor, other_TNH: Tensor, other_lse_TN: Tensor) -> None:
    """Take the attention of the same queries over other keys in, in place; all is fp32."""
    check_rows(out_TNH, other_TNH)
    tokens, heads, size = out_TNH.shape
    if not out_TNH.numel():
        return
    columns = padded(size)
    rows = max(1, _TILE_ELEMENTS // columns)
    _merge_kernel[(triton.cdiv(tokens * heads, rows),)](
        out_TNH,
        lse_TN,
        other_TNH,
        other_lse_TN,
        *out_TNH.stride()[:2],
        *lse_TN.stride(),
        *other_TNH.stride()[:2],
        *other_lse_TN.stride(),
        tokens * heads,
        NUM_HEADS=heads,
        SIZE=size,
        COLUMNS=columns,
        ROWS=rows,
        num_warps=4,
    )


def merge_parts(
    parts_TNCH: Tensor, parts_lse_TNC: Tensor, out_TNH: Tensor, lse_TN: Tensor | None
) -> None:
    """Write the attention over all parts to `out_TNH`, of any dtype, and its LSE where wanted."""
    check_rows(parts_TNCH, parts_lse_TNC, out_TNH)
    tokens, heads, parts, size = parts_TNCH.shape
    if not out_TNH.numel():
        return
    check_grid(heads, "heads")
    lse = parts_lse_TNC if lse_TN is None else lse_TN
    _merge_parts_kernel[(tokens, heads)](
        parts_TNCH,
        parts_lse_TNC,
        out_TNH,
        lse,
        *parts_TNCH.stride()[:3],
        *parts_lse_TNC.stride()[:2],
        *out_TNH.stride()[:2],
        *lse.stride()[:2],
        parts,
        SIZE=size,
        COLUMNS=padded(size),
        PARTS=_PARTS,
        HAS_LSE=lse_TN is not None,
        num_warps=4,
    )
