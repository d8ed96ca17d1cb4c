"""What `merge` computes, in torch's operators. Legend: as there."""

import torch
from torch import Tensor


def merge(out_TNH: Tensor, lse_TN: Tensor, other_TNH: Tensor, other_lse_TN: Tensor) -> None:
    """Take the attention of the same queries over other keys in, in place."""
    both_2TN = torch.stack((lse_TN, other_lse_TN))
    outs_2TNH = torch.stack((out_TNH, other_TNH))
    outs_2TNH = outs_2TNH.masked_fill((both_2TN == -torch.inf)[..., None], 0)
    merged_TN = torch.logsumexp(both_2TN, 0)
    finite_TN = merged_TN.masked_fill(merged_TN == -torch.inf, 0)
    weights_2TN = torch.exp(both_2TN - finite_TN)
    out_TNH.copy_((outs_2TNH * weights_2TN[..., None]).sum(0))
    lse_TN.copy_(merged_TN)
