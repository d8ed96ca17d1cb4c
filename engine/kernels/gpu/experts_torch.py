"""A sparse layer's experts, by torch's operators. Legend: as engine.kernels.gpu.experts."""

import torch
from torch import Tensor
from torch.nn import functional as F


def experts(
    x_TD: Tensor, gate_up_EUD: Tensor, down_EDI: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Return what each token's experts make of it, weighted and added in their order: fp32 [T, D].

    A choice of -1 is an expert that is not here, and adds nothing.
    """
    tokens, choices = experts_TK.shape
    tokens_P = torch.arange(tokens, device=x_TD.device).repeat_interleave(choices)
    y_PD = expert_pairs(x_TD, gate_up_EUD, down_EDI, tokens_P, experts_TK.flatten())
    y_TKD = y_PD.view(tokens, choices, -1).float()
    sum_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for y_TD, weight_T in zip(y_TKD.unbind(1), weights_TK.unbind(1), strict=True):
        sum_TD += y_TD * weight_T[:, None]
    return sum_TD


def expert_pairs(
    x_TD: Tensor, gate_up_EUD: Tensor, down_EDI: Tensor, tokens_P: Tensor, experts_P: Tensor
) -> Tensor:
    """Return what each pair's expert makes of its token, [P, D]; zeros where the expert is -1."""
    y_PD = x_TD.new_zeros(len(tokens_P), x_TD.shape[1])
    for expert, (gate_up, down) in enumerate(zip(gate_up_EUD, down_EDI, strict=True)):
        chosen = experts_P == expert
        gate, up = (x_TD[tokens_P[chosen]] @ gate_up.T).chunk(2, dim=-1)
        y_PD[chosen] = (F.silu(gate.float()) * up.float()).to(x_TD.dtype) @ down.T
    return y_PD
