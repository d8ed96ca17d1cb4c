"""Packed all-to-all: each rank is sent the rows that it needs, and nothing else.

The least bytes, and best where there are many tokens; but the ranks tell each other first how many
there will be, and the host waits for that.

Legend: t this rank's tokens, K experts of a token, D hidden size, W ranks, J of them for
each expert, R rows, P pairs of a token and its choice, X pairs' parts that came back.
"""

import torch
from torch import Tensor

from engine.dispatch.dispatcher import Choices, Members, PairExperts, Router, weighted_sum
from engine.dispatch.message import RowFormat


class PackedAllToAll:
    """Counts, then rows to the ranks and every pair's output back; see Dispatcher."""

    def __init__(self, members: Members) -> None:
        self._members = members

    def __call__(
        self, x_TD: Tensor, router: Router, experts: PairExperts, most_rows: int
    ) -> Tensor:
        """See Dispatcher."""
        members = self._members
        own = members.own(len(x_TD))
        x_tD = x_TD[own]
        choices = router(x_tD, own.start)
        sum_tD = self._there_and_back(x_tD, choices, experts)
        return members.tp.all_gather_rows(sum_tD, len(x_TD))

    def _there_and_back(self, x_tD: Tensor, choices: Choices, experts: PairExperts) -> Tensor:
        group, etp = self._members.group, self._members.layout.etp
        width, top_k = choices.width, choices.slots_TK.shape[1]
        rank_tK = choices.slots_TK // width
        first_W = torch.arange(group.size, device=x_tD.device) // etp
        wants_WtK = rank_tK == first_W[:, None, None]
        wants_Wt = wants_WtK.any(2)
        target_R, row_R = wants_Wt.nonzero(as_tuple=True)
        # The one time that the host waits: how many rows and pairs go and come.
        counts_W2 = torch.stack((wants_Wt.sum(1), wants_WtK.sum((1, 2))), 1)
        counts = torch.cat((counts_W2, group.all_to_all(counts_W2)), 1)
        give, pairs_in, take, pairs_out = counts.T.tolist()

        # A choice that lies elsewhere gets -1.
        slots_RK = (choices.slots_TK - rank_tK * width)[row_R]
        slots_RK = slots_RK.masked_fill(~wants_WtK[target_R, row_R], -1)
        format_ = RowFormat(top_k, x_tD.shape[1], x_tD.dtype)
        message = format_.pack(x_tD[row_R], slots_RK.int())
        there_RD, there_RK = format_.unpack(group.all_to_all(message, give, take))

        there_P, choice_P = (there_RK >= 0).nonzero(as_tuple=True)
        y_PD = experts(there_RD, there_P, there_RK[there_P, choice_P].long())
        back_XD = group.all_to_all(y_PD, pairs_out, pairs_in)
        return self._combined(back_XD, wants_WtK, choices.weights_TK)

    def _combined(self, back_XD: Tensor, wants_WtK: Tensor, weights_tK: Tensor) -> Tensor:
        """Return the weighted sums of outputs that are in the order of rank, token, choice."""
        etp = self._members.layout.etp
        _, tokens, top_k = wants_WtK.shape
        rank_X, token_X, choice_X = wants_WtK.nonzero(as_tuple=True)
        place_JtK = token_X.new_empty(etp, tokens, top_k)
        place_JtK[rank_X % etp, token_X, choice_X] = torch.arange(
            len(back_XD), device=back_XD.device
        )
        return weighted_sum(back_XD, place_JtK, weights_tK)
