"""Tokens drawn from filtered distributions, by sorting in fp64; legend as in `draw`."""

import torch
from torch import Tensor


def draw(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    number_S: Tensor,
) -> Tensor:
    """Return a token of each row, [S] int64; see engine.sampling for what the filters mean.

    Args:
        logits_SV: fp32.
        temperature_S: Above 0.
        top_k_S: 0 keeps all tokens.
        number_S: From 0 to below 1, fp64: which token it is, by the sums of the weights that are
            left, in the order of token ids.
    """
    vocab = logits_SV.shape[1]
    wide_SV = logits_SV.double()
    wide_SV = (wide_SV - wide_SV.amax(-1, keepdim=True)) / temperature_S.double()[:, None]
    values_SV, ids_SV = wide_SV.sort(dim=-1, descending=True, stable=True)
    ranked_SV = values_SV.exp()
    rank_V = torch.arange(vocab, device=logits_SV.device)
    inside_SV = rank_V < torch.where(top_k_S > 0, top_k_S, vocab)[:, None]
    ranked_SV = ranked_SV.where(inside_SV, 0)
    before_SV = ranked_SV.cumsum(-1) - ranked_SV
    top_p_S1 = top_p_S.double()[:, None]
    kept_SV = (before_SV < top_p_S1 * ranked_SV.sum(-1, keepdim=True)) | (top_p_S1 >= 1)
    kept_SV[:, 0] = True
    kept_SV &= ranked_SV >= min_p_S.double()[:, None]
    weights_SV = torch.zeros_like(ranked_SV).scatter_(-1, ids_SV, ranked_SV.where(kept_SV, 0))
    steps_SV = weights_SV.cumsum(-1)
    found_S1 = torch.searchsorted(steps_SV, number_S[:, None] * steps_SV[:, -1:], right=True)
    last_S1 = torch.searchsorted(steps_SV, steps_SV[:, -1:].contiguous())
    return found_S1.minimum(last_S1)[:, 0]
