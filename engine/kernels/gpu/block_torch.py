"""What `block` computes, in torch's operators. Legend: as there."""

import torch
from torch import Tensor

from engine.kernels.gpu.options import Seen


def block(
    q_TNH: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    *,
    table_B: Tensor | None = None,
    scale: float = 1.0,
    soft_cap: float | None = None,
    out_TNV: Tensor | None = None,
    lse_TN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention, [T, N, V], and its natural-log LSE, [T, N]; fp64 where queries are."""
    wide = torch.promote_types(q_TNH.dtype, torch.float32)
    tokens, heads, size = q_TNH.shape
    k_LGH, v_LGV = (_rows(each, table_B, seen.end).to(wide) for each in (k, v))
    kv_heads = k_LGH.shape[1]
    q_TGRH = q_TNH.to(wide).view(tokens, kv_heads, heads // kv_heads, size)
    scores = torch.einsum("tgrh,lgh->tgrl", q_TGRH, k_LGH) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    at_L = torch.arange(len(k_LGH), device=q_TNH.device)
    hidden_TL = (at_L < seen.low_T[:, None]) | (at_L >= seen.high_T[:, None])
    scores = scores.masked_fill(hidden_TL[:, None, None], -torch.inf)
    lse_TGR = scores.logsumexp(-1)
    finite = lse_TGR.masked_fill(lse_TGR == -torch.inf, 0)[..., None]
    # A weight of zero does not hide a NaN.
    v_LGV = v_LGV.masked_fill(hidden_TL.all(0)[:, None, None], 0)
    out_TGRV = torch.einsum("tgrl,lgv->tgrv", torch.exp(scores - finite), v_LGV)
    value_size = v.shape[-1]
    if out_TNV is None:
        out_TNV = torch.empty((tokens, heads, value_size), dtype=wide, device=q_TNH.device)
    if lse_TN is None:
        lse_TN = torch.empty((tokens, heads), dtype=wide, device=q_TNH.device)
    out_TNV.copy_(out_TGRV.reshape(tokens, heads, value_size))
    lse_TN.copy_(lse_TGR.reshape(tokens, heads))
    return out_TNV, lse_TN


def _rows(cached: Tensor, table_B: Tensor | None, end: int) -> Tensor:
    """Return the first `end` keys or values, [L, G, H]."""
    if table_B is None:
        return cached[:end]
    places = cached.shape[2]
    blocks = table_B[: -(-end // places)].long()
    return cached[blocks].transpose(1, 2).reshape(-1, cached.shape[1], cached.shape[3])[:end]
