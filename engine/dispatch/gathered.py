"""All-gather: every rank gets all tokens, and what each makes of its experts is added up.

The fewest and simplest messages, best where there are few tokens. The ranks' sums are added in
their order; where the experts are decides which of a token's choices are added first. Nothing
waits for a count here either.

Legend: T tokens of a dp rank, r rows of each rank, R = W * r of all, K experts of a token, D hidden
size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.dispatch.dispatcher import Choices, Members, PairExperts, Router, weighted_sum
from engine.dispatch.message import RowFormat


class AllGather:
    """Tokens to all, sums back by reduce-scatter; with one dp rank one all-reduce instead.

    See Dispatcher.
    """

    def __init__(self, members: Members) -> None:
        self._members = members

    def __call__(
        self, x_TD: Tensor, router: Router, experts: PairExperts, most_rows: int
    ) -> Tensor:
        """See Dispatcher."""
        members = self._members
        own = members.own(len(x_TD))
        if members.layout.dp == 1:
            choices = router(x_TD, 0, own)
            slots_TK = members.local(choices.slots_TK, choices.width)
            sum_TD = _local_sum(x_TD, slots_TK, choices.weights_TK, experts)
            return members.group.all_reduce(sum_TD)
        sum_tD = self._over_all(x_TD[own], router(x_TD[own], own.start), experts, most_rows)
        return members.tp.all_gather_rows(sum_tD, len(x_TD))

    def _over_all(
        self, x_tD: Tensor, choices: Choices, experts: PairExperts, most_rows: int
    ) -> Tensor:
        members = self._members
        tokens, top_k = choices.slots_TK.shape
        more = (0, 0, 0, members.part(most_rows) - tokens)
        format_ = RowFormat(2 * top_k, x_tD.shape[1], x_tD.dtype)
        message = format_.pack(
            F.pad(x_tD, more),
            F.pad(choices.slots_TK.int(), more, value=-1),
            F.pad(choices.weights_TK, more),
        )
        x_RD, numbers = format_.unpack(members.group.all_gather(message))
        slots_RK = members.local(numbers[:, :top_k].long(), choices.width)
        weights_RK = numbers[:, top_k:].view(torch.float32)
        sum_RD = _local_sum(x_RD, slots_RK, weights_RK, experts)
        return members.group.reduce_scatter(sum_RD)[:tokens]


def _local_sum(x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor, experts: PairExperts) -> Tensor:
    """Return the sums over this rank's experts, zero for tokens that have none here."""
    rows, top_k = slots_RK.shape
    place_RK = torch.arange(rows * top_k, device=x_RD.device).view(rows, top_k)
    y_XD = experts(x_RD, place_RK.flatten() // top_k, slots_RK.flatten())
    return weighted_sum(y_XD, place_RK[None], weights_RK)
