"""Tokens drawn from filtered distributions, without a sort.

Owns no seeds: the random numbers come with the call. Legend: S sequences, V vocabulary.

A program has a row. What top-k and top-p keep is what lies above a threshold, and of those at it
the ones with the lowest ids. It is found bit by bit, in the order of the numbers' bits: top-k's is
the largest with k tokens at or above it, top-p's the largest with enough weight there. Each bit
costs a pass over the row, which the L2 holds; a sort would cost more of them, of twice the bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.runtime import check_rows, padded

_TILE = 4096
_SIGN = tl.constexpr(1 << 31)


@triton.jit
def _keys(values):
    """Return numbers from 0 to 2^32 that are ordered as fp32 values are."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + _SIGN


@triton.jit
def _loaded(row, first, vocab, TILE: tl.constexpr):
    ids = first + tl.arange(0, TILE)
    return ids, tl.load(row + ids, mask=ids < vocab, other=float("-inf"))


@triton.jit
def _number_from(row, vocab, key, TILE: tl.constexpr):
    """Return how many tokens have this key or a higher one."""
    count = 0
    for first in range(0, vocab, TILE):
        ids, values = _loaded(row, first, vocab, TILE)
        count += tl.sum(((_keys(values) >= key) & (ids < vocab)).to(tl.int32), 0)
    return count


@triton.jit
def _weight_from(row, vocab, key, top, temperature, TILE: tl.constexpr):
    """Return the sum of the weights of tokens that have this key or a higher one."""
    total = tl.zeros([1], tl.float64)
    for first in range(0, vocab, TILE):
        _, values = _loaded(row, first, vocab, TILE)
        weights = tl.exp((values - top) / temperature)
        total += tl.sum(tl.where(_keys(values) >= key, weights, 0.0).to(tl.float64), 0)
    return tl.sum(total, 0)


@triton.jit
def _weight_at(key, top, temperature):
    """Return the weight of a token that has this key."""
    bits = (key - _SIGN).to(tl.int32)
    value = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    return tl.exp((value - top) / temperature)


@triton.jit
def _kept(ids, values, vocab, top, temperature, min_p, threshold, ties, seen):
    """Return a tile's weights, 0 where a token is left out, and the ties seen so far."""
    keys = _keys(values)
    at = ((keys == threshold) & (ids < vocab)).to(tl.int32)
    rank = seen + tl.cumsum(at, 0) - at
    weights = tl.exp((values - top) / temperature)
    stays = (keys > threshold) | ((at > 0) & (rank < ties))
    stays = stays & (weights >= min_p) & (ids < vocab)
    return tl.where(stays, weights, 0.0).to(tl.float64), seen + tl.sum(at, 0)


@triton.jit
def _draw_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    numbers,
    out,
    logits_s,
    vocab,
    TILE: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    row = logits + sequence * logits_s
    temperature = tl.load(temperatures + sequence)
    top_k = tl.load(top_ks + sequence).to(tl.int32)
    top_p = tl.load(top_ps + sequence)
    min_p = tl.load(min_ps + sequence)

    best = tl.full([TILE], float("-inf"), tl.float32)
    for first in range(0, vocab, TILE):
        _, values = _loaded(row, first, vocab, TILE)
        best = tl.maximum(best, values)
    top = tl.max(best, 0)

    # Everything is kept unless a filter says otherwise.
    threshold = tl.full([], 0, tl.int64)
    ties = vocab
    if (top_k > 0) & (top_k < vocab):
        for bit in range(31, -1, -1):
            tried = threshold | (tl.full([], 1, tl.int64) << bit)
            if _number_from(row, vocab, tried, TILE) >= top_k:
                threshold = tried
        ties = top_k - _number_from(row, vocab, threshold + 1, TILE)
    if top_p < 1.0:
        floor, floor_ties = threshold, ties
        floor_weight = _weight_at(floor, top, temperature).to(tl.float64)
        # A floor of 0 is no token's: nobody is tied there.
        tied = tl.where(floor > 0, floor_ties * floor_weight, 0.0)
        enough = top_p.to(tl.float64) * (
            _weight_from(row, vocab, floor + 1, top, temperature, TILE) + tied
        )
        threshold = tl.full([], 0, tl.int64)
        for bit in range(31, -1, -1):
            tried = threshold | (tl.full([], 1, tl.int64) << bit)
            reached = _weight_from(row, vocab, tl.maximum(tried, floor + 1), top, temperature, TILE)
            reached += tl.where(tried <= floor, tied, 0.0)
            if reached >= enough:
                threshold = tried
        above = _weight_from(row, vocab, tl.maximum(threshold, floor) + 1, top, temperature, TILE)
        weight = _weight_at(threshold, top, temperature).to(tl.float64)
        wanted = tl.ceil((enough - above) / tl.maximum(weight, 1e-300))
        ties = tl.maximum(1, tl.minimum(wanted, vocab * 1.0).to(tl.int32))
        ties = tl.where(threshold == floor, tl.minimum(ties, floor_ties), ties)

    total = tl.zeros([1], tl.float64)
    seen = 0
    for first in range(0, vocab, TILE):
        ids, values = _loaded(row, first, vocab, TILE)
        weights, seen = _kept(ids, values, vocab, top, temperature, min_p, threshold, ties, seen)
        total += tl.sum(weights, 0)
    target = tl.load(numbers + sequence) * tl.sum(total, 0)

    found, last, seen = vocab, 0, 0
    so_far = tl.zeros([1], tl.float64)
    for first in range(0, vocab, TILE):
        ids, values = _loaded(row, first, vocab, TILE)
        weights, seen = _kept(ids, values, vocab, top, temperature, min_p, threshold, ties, seen)
        passed = (so_far + tl.cumsum(weights, 0) > target) & (weights > 0)
        found = tl.minimum(found, tl.min(tl.where(passed, ids, vocab), 0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, ids, 0), 0))
        so_far += tl.sum(weights, 0)
    # Rounding can put the target on the last step.
    tl.store(out + sequence, tl.where(found < vocab, found, last).to(tl.int64))


def draw(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    number_S: Tensor,
) -> Tensor:
    """Return a token of each row, [S] int64; see engine.sampling for what the filters mean.

    Weights are fp32 and their sums fp64. Nothing waits for the device.

    Args:
        logits_SV: fp32.
        temperature_S: fp32, above 0.
        top_k_S: 0 keeps all tokens.
        top_p_S: fp32, from above 0 to 1.
        min_p_S: fp32, from 0 to 1.
        number_S: From 0 to below 1, fp64: which token it is, by the sums of the weights that are
            left, in the order of token ids.
    """
    check_rows(logits_SV)
    sequences, vocab = logits_SV.shape
    out_S = torch.empty(sequences, dtype=torch.int64, device=logits_SV.device)
    if sequences:
        tile = min(_TILE, max(16, padded(vocab)))
        _draw_kernel[(sequences,)](
            logits_SV,
            temperature_S,
            top_k_S,
            top_p_S,
            min_p_S,
            number_S,
            out_S,
            logits_SV.stride(0),
            vocab,
            TILE=tile,
            num_warps=8,
        )
    return out_S
