"""What `decode` computes, in torch's operators, sequence by sequence. Legend: as there."""

import torch
from torch import Tensor

from engine.kernels.gpu.block_torch import block
from engine.kernels.gpu.options import DecodeOptions, causal


def decode(
    q_SNH: Tensor,
    k_BGPH: Tensor,
    v_BGPH: Tensor,
    tables_SB: Tensor,
    lengths_S: Tensor,
    longest: int,
    options: DecodeOptions,
    *,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return attention, [S, N, H] in the queries' dtype, and its natural-log LSE [S, N]."""
    wide = torch.promote_types(q_SNH.dtype, torch.float32)
    out_SNH = torch.empty(q_SNH.shape, dtype=wide, device=q_SNH.device)
    lse_SN = torch.empty(q_SNH.shape[:2], dtype=wide, device=q_SNH.device)
    for row, length in enumerate(lengths_S.tolist()):
        block(
            q_SNH[row : row + 1],
            k_BGPH,
            v_BGPH,
            causal(1, length, length - 1, q_SNH.device, options.window),
            table_B=tables_SB[row],
            scale=options.scale,
            soft_cap=options.soft_cap,
            out_TNV=out_SNH[row : row + 1],
            lse_TN=lse_SN[row : row + 1],
        )
    return out_SNH.to(q_SNH.dtype), lse_SN if with_lse else None
