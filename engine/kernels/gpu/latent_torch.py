"""Attention over latents, by torch's operators. Legend: as engine.kernels.gpu.latent."""

import torch
from torch import Tensor


def attend(
    q_TNX: Tensor,
    cells_BPX: Tensor,
    latent: int,
    tables_TB: Tensor,
    lengths_T: Tensor,
    longest: int,
    *,
    scale: float = 1.0,
    split_tokens: int | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the mixed latents, [T, N, C] in the queries' dtype, and the natural-log LSE [T, N].

    A query of no tokens gets zeros and -inf.
    """
    tokens, heads = q_TNX.shape[:2]
    places = cells_BPX.shape[1]
    wide = torch.promote_types(q_TNX.dtype, torch.float32)
    out_TNC = torch.zeros((tokens, heads, latent), dtype=wide, device=q_TNX.device)
    lse_TN = torch.full((tokens, heads), -torch.inf, dtype=wide, device=q_TNX.device)
    for row, length in enumerate(lengths_T.tolist()):
        if length:
            blocks = tables_TB[row, : -(-length // places)].long()
            cells_LX = cells_BPX[blocks].flatten(0, 1)[:length].to(wide)
            scores_NL = q_TNX[row].to(wide) @ cells_LX.T * scale
            lse_TN[row] = scores_NL.logsumexp(-1)
            out_TNC[row] = scores_NL.softmax(-1) @ cells_LX[:, :latent]
    return out_TNC.to(q_TNX.dtype), lse_TN if with_lse else None
