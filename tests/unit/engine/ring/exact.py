"""Attention the plain way, in float64, and inputs for it."""

import torch
from torch import Tensor


def attention(
    q_TNH: Tensor, at_T: Tensor, kv_LXH: Tensor, at_L: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return out [T, N, H] and lse [T, N] in float64, from all scores at once.

    Rows that see no key have an out of zero and an lse of -inf.
    """
    q, kv = q_TNH.double(), kv_LXH.double()
    kv_heads = kv.shape[1] // 2
    shared = q.shape[1] // kv_heads
    k_LNH = kv[:, :kv_heads].repeat_interleave(shared, dim=1)
    v_LNH = kv[:, kv_heads:].repeat_interleave(shared, dim=1)
    scores_NTL = torch.einsum("tnh,lnh->ntl", q, k_LNH)
    seen_TL = at_L[None, :] <= at_T[:, None]
    if window is not None:
        seen_TL &= at_L[None, :] > at_T[:, None] - window
    scores_NTL = scores_NTL.masked_fill(~seen_TL, -torch.inf)
    lse_NT = torch.logsumexp(scores_NTL, dim=-1)
    weights_NTL = torch.exp(
        scores_NTL - lse_NT.clamp_min(torch.finfo(torch.float64).min)[..., None]
    )
    return torch.einsum("ntl,lnh->tnh", weights_NTL, v_LNH), lse_NT.T


def inputs(
    seed: int, tokens: int, keys: int, heads: int, kv_heads: int, head_size: int
) -> tuple[Tensor, Tensor]:
    """Return random queries, scaled, and keys with values, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    q_TNH = torch.randn(tokens, heads, head_size, generator=generator) * head_size**-0.5
    kv_LXH = torch.randn(keys, 2 * kv_heads, head_size, generator=generator)
    return q_TNH, kv_LXH
