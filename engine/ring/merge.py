"""Puts attention over parts of the keys together. Owns the arithmetic, no order and no exchange.

Legend: T query rows, N query heads, H head size.

Attention over disjoint sets of keys is merged by the log of each set's sum of exponentials: the
weight of a set is its share of the sum of all. See FlashAttention-2, arXiv 2307.08691, section 3.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels import paged

_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Partial:
    """Attention over some of the keys: `out_TNH`, normalised over them, and `lse_TN`, both fp32.

    The lse is the natural logarithm of the sum of exp(score); rows that saw no key have -inf and
    an out of zero. Both are views of `memory`, one flat tensor, which is what travels.
    """

    memory: Tensor
    out_TNH: Tensor
    lse_TN: Tensor

    @classmethod
    def undefined(cls, q_TNH: Tensor) -> "Partial":
        """Return memory for attention of these queries, its content undefined."""
        cells, head_size = q_TNH.shape[0] * q_TNH.shape[1], q_TNH.shape[2]
        memory = torch.empty(cells * (head_size + 1), dtype=torch.float32, device=q_TNH.device)
        out, lse = memory[: cells * head_size], memory[cells * head_size :]
        return cls(memory, out.view(q_TNH.shape), lse.view(q_TNH.shape[:2]))

    @classmethod
    def nothing(cls, q_TNH: Tensor) -> "Partial":
        """Return the attention of these queries over no keys: what merges leave as it is."""
        partial = cls.undefined(q_TNH)
        partial.out_TNH.zero_()
        partial.lse_TN.fill_(-torch.inf)
        return partial

    def rows(self, begin: int, end: int) -> "Partial":
        """Return a view of some rows; its `memory` is still that of all."""
        return Partial(self.memory, self.out_TNH[begin:end], self.lse_TN[begin:end])

    def merge(self, other: "Partial") -> None:
        """Take in the attention of the same queries over other keys, in place."""
        kernels = paged(self.memory.device)
        if kernels is not None:
            kernels.merge(self.out_TNH, self.lse_TN, other.out_TNH, other.lse_TN)
            return
        # Finite, so that rows where neither saw a key get weights of zero and not NaN.
        top_TN = torch.maximum(self.lse_TN, other.lse_TN).clamp_min_(_LOWEST)
        mine_TN = torch.exp(self.lse_TN - top_TN)
        theirs_TN = torch.exp(other.lse_TN - top_TN)
        total_TN = mine_TN + theirs_TN
        # From the weights themselves, not from the merged lse: that is rounded more coarsely the
        # greater it is. The sum is at least 1 where either saw a key.
        scale_TN = total_TN.clamp_min(1).reciprocal_()
        self.out_TNH.mul_(mine_TN.mul_(scale_TN)[..., None])
        self.out_TNH.addcmul_(other.out_TNH, theirs_TN.mul_(scale_TN)[..., None])
        self.lse_TN.copy_(total_TN.log_().add_(top_TN))
