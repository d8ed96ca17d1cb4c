"""Attention of some of a sequence's queries over some of its keys. Owns no memory.

Legend: T query rows, L key rows, t and l some of them, N query heads, G KV heads, X = 2G (the K
heads, then the V heads) or 1 where a token's key is its value as well, R = N / G query heads that
share a KV head, H head size.

Both lie in order of their positions, so the keys that a slice of queries may look at are a range of
rows, and a mask is needed at its two ends only. Products are in the inputs' type, accumulated in
fp32; all else is in fp32. On a GPU it is a kernel's work, in bf16 on the CPU that of compiled code
where the machine can have it, else that of torch's operators, slice by slice.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels import attention_native, paged
from engine.kernels.attention_native import Piece
from engine.kernels.gpu.options import Seen
from engine.kernels.table import PagedKernels
from engine.placed import placed
from engine.ring.merge import Partial

# Queries in a slice, and the scores that a slice may have in all: 32 MiB in fp32.
_SLICE_QUERIES = 64
_SLICE_SCORES = 1 << 23


Positions = NDArray[np.int64]


def seen(at_L: Positions, at_T: Positions, window: int | None) -> tuple[int, int]:
    """Return the first row, and that after the last, of the keys that some query may look at."""
    if not len(at_T):
        return 0, 0
    first = 0 if window is None else at_T[0] - window + 1
    low, high = np.searchsorted(at_L, (first, at_T[-1] + 1))
    return int(low), int(high)


def attend(
    q_TNH: Tensor,
    at_T: Positions,
    kv_LXH: Tensor,
    at_L: Positions,
    window: int | None = None,
) -> Partial:
    """Return the causal attention of queries at positions `at_T` over keys at `at_L`, ascending.

    Queries are scaled already. With a window, a query sees itself and the window - 1 tokens before
    it. Keys that no query sees are not read.
    """
    begin, end = seen(at_L, at_T, window)
    if begin == end:
        return Partial.nothing(q_TNH)
    if kv_LXH.shape[1] == 1:
        kv_LXH = kv_LXH.expand(-1, 2, -1)
    kernels = paged(q_TNH.device)
    if kernels is not None:
        return _attend_paged(kernels, q_TNH, kv_LXH, *_ranges(at_T, at_L, window))
    native = attention_native.attention()
    if native is None or not attention_native.fits(q_TNH, kv_LXH):
        return _attend_torch(q_TNH, at_T, kv_LXH, at_L, window)
    partial = Partial.undefined(q_TNH)
    piece = Piece(
        q_TNH=q_TNH,
        kv_LXH=kv_LXH,
        out_TNH=partial.out_TNH,
        lse_TN=partial.lse_TN,
        seen=_ranges(at_T, at_L, window),
    )
    native([piece])
    return partial


def _ranges(at_T: Positions, at_L: Positions, window: int | None) -> tuple[Positions, Positions]:
    """Return the first key that each query sees, and the one after its last."""
    if window is None:
        low_T = np.zeros(len(at_T), np.int64)
    else:
        low_T = np.searchsorted(at_L, at_T - window + 1)
    return low_T, np.searchsorted(at_L, at_T, "right")


def _attend_paged(
    kernels: PagedKernels, q_TNH: Tensor, kv_LXH: Tensor, low_T: Positions, high_T: Positions
) -> Partial:
    partial, device = Partial.undefined(q_TNH), q_TNH.device
    low, high = (placed(each.astype(np.int32), device) for each in (low_T, high_T))
    k_LGH, v_LGH = kv_LXH.chunk(2, dim=1)
    kernels.block(
        q_TNH,
        k_LGH,
        v_LGH,
        Seen(low, high, int(high_T[-1])),
        out_TNV=partial.out_TNH,
        lse_TN=partial.lse_TN,
    )
    return partial


def _attend_torch(
    q_TNH: Tensor, at_T: Positions, kv_LXH: Tensor, at_L: Positions, window: int | None
) -> Partial:
    tokens, heads, head_size = q_TNH.shape
    kv_heads = kv_LXH.shape[1] // 2
    partial = Partial.nothing(q_TNH)
    begin, end = seen(at_L, at_T, window)
    kv_XlH = kv_LXH[begin:end].transpose(0, 1).contiguous()
    k_GlH, v_GlH = kv_XlH[:kv_heads], kv_XlH[kv_heads:]
    q_GTRH = q_TNH.view(tokens, kv_heads, -1, head_size).transpose(0, 1)
    step = max(1, min(_SLICE_SCORES // (heads * (end - begin)), _SLICE_QUERIES))
    for first in range(0, tokens, step):
        at_t = at_T[first : first + step]
        low, high = seen(at_L, at_t, window)
        if low == high:
            continue
        rows = slice(low - begin, high - begin)
        _attend_slice(
            q_GTRH[:, first : first + step],
            k_GlH[:, rows],
            v_GlH[:, rows],
            _hidden(at_L[low:high], at_t, window),
            partial.rows(first, first + step),
        )
    return partial


def _hidden(at_l: Positions, at_t: Positions, window: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield columns that not every query may look at, with [t, 1, c], true where one must not.

    There are two sorts, which may overlap: keys after the first query, and those before the last
    one's window. All other columns need no mask, and a pass over the scores less.
    """
    at_t1 = at_t[:, None]
    after = slice(int(np.searchsorted(at_l, at_t[0], "right")), len(at_l))
    if after.start < after.stop:
        yield after, torch.from_numpy(at_l[after] > at_t1)[:, None]
    if window is None:
        return
    before = slice(0, int(np.searchsorted(at_l, at_t[-1] - window, "right")))
    if before.stop:
        yield before, torch.from_numpy(at_l[before] <= at_t1 - window)[:, None]


def _attend_slice(
    q_GtRH: Tensor,
    k_GlH: Tensor,
    v_GlH: Tensor,
    hidden: Iterable[tuple[slice, Tensor]],
    into: Partial,
) -> None:
    kv_heads, tokens, shared, head_size = q_GtRH.shape
    scores = torch.bmm(q_GtRH.reshape(kv_heads, -1, head_size), k_GlH.transpose(1, 2))
    scores_GtRl = scores.view(kv_heads, tokens, shared, -1)
    for columns, mask_t1c in hidden:
        scores_GtRl[..., columns].masked_fill_(mask_t1c.to(scores.device), -torch.inf)
    scores = scores.float()
    top = scores.amax(-1, keepdim=True)
    # torch's softmax is faster than an exp of its own. It keeps its sum for itself, but the
    # greatest weight is exp(0) over that sum.
    weights = scores.softmax(-1)
    lse = top - weights.amax(-1, keepdim=True).log_()
    out = torch.bmm(weights.to(v_GlH.dtype), v_GlH).float()
    blind = top == -torch.inf  # rows that may look at nothing, of which softmax makes NaN
    out.masked_fill_(blind, 0)
    lse.masked_fill_(blind, -torch.inf)
    into.out_TNH.view(tokens, kv_heads, shared, head_size).copy_(
        out.view(kv_heads, tokens, shared, head_size).transpose(0, 1)
    )
    into.lse_TN.view(tokens, kv_heads, shared).copy_(
        lse.view(kv_heads, tokens, shared).transpose(0, 1)
    )
