"""Softmax over keys that come tile by tile. Owns the arithmetic, no memory and no order.

Source: FlashAttention-2, arXiv 2307.08691, section 3.1. Legend: M query rows, L keys of a tile, H
head size. Scores are in powers of two, all state is fp32: `top` the greatest score of a row so far,
`total` the sum of 2^(score - top), `mixed` the values weighted by it.

A row that saw no key has a top of -inf, and leaves with an output of zero and an LSE of -inf.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# tanh is 1 in fp32 from here on.
_FLAT = tl.constexpr(15.0)


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """Return a @ b in fp32. Triton's interpreter has no bf16 products, so `UPCAST` there."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def scored(q, k, scale, cap, CAPPED: tl.constexpr, UPCAST: tl.constexpr):
    """Return the scores of queries [M, H] and keys [L, H], [M, L], in powers of two."""
    scores = product(q, tl.trans(k), UPCAST) * scale
    if CAPPED:
        at = tl.minimum(tl.maximum(scores / cap, -_FLAT), _FLAT)
        scores = cap * (1.0 - 2.0 / (tl.exp2(at * (2.0 * LOG2_E)) + 1.0))
    return scores * LOG2_E


@triton.jit
def take_in(scores, v, top, total, mixed, UPCAST: tl.constexpr):
    """Return top, total and mixed with one more tile; what is hidden has a score of -inf."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    # Finite, so that a row that saw nothing yet gets weights of zero and not NaN.
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - finite[:, None])
    shrunk = tl.exp2(top - finite)
    total = total * shrunk + tl.sum(weights, 1)
    mixed = mixed * shrunk[:, None] + product(weights.to(v.dtype), v, UPCAST)
    return new_top, total, mixed


@triton.jit
def finished(top, total, mixed):
    """Return the output, and the natural logarithm of the sum of exp(score)."""
    saw = total > 0
    divisor = tl.where(saw, total, 1.0)
    lse = tl.where(saw, (top + tl.log2(divisor)) * LN_2, float("-inf"))
    return mixed / divisor[:, None], lse
