"""All-to-all with a fixed capacity: the same shapes whatever the router says.

Nothing waits for a count, so that a step can be captured as a graph. A rank has room for all rows
of all others, since all may want its experts: no token is ever dropped, and a message has as many
bytes as if they did.

Legend: r rows that each rank has room for of another, t <= r tokens of this rank, K experts of a
token, C choices that one rank can have of it, D hidden size, W ranks, J of them for each expert.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.dispatch.dispatcher import Choices, Members, PairExperts, Router, weighted_sum
from engine.dispatch.message import RowFormat


class PaddedAllToAll:
    """Rows in fixed places to every rank, and outputs in fixed places back; see Dispatcher.

    The capacity follows from the step's bucket, the least power of two that is enough.
    """

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
        sum_tD = self._there_and_back(x_tD, choices, experts, members.part(bucket_of(most_rows)))
        return members.tp.all_gather_rows(sum_tD, len(x_TD))

    def _there_and_back(
        self, x_tD: Tensor, choices: Choices, experts: PairExperts, room: int
    ) -> Tensor:
        group, etp = self._members.group, self._members.layout.etp
        tokens, top_k = choices.slots_TK.shape
        most = min(top_k, choices.width)
        slots_WtC, place_WtK = self._places(choices, most)
        x_WrD = x_tD.new_zeros(group.size, room, x_tD.shape[1])
        # Rows that a rank does not need stay zero: nobody sees more than it must.
        x_WrD[:, :tokens] = x_tD.where(slots_WtC[..., :1] >= 0, 0)
        slots_WrC = F.pad(slots_WtC, (0, 0, 0, room - tokens), value=-1)

        format_ = RowFormat(most, x_tD.shape[1], x_tD.dtype)
        message = format_.pack(x_WrD.flatten(0, 1), slots_WrC.flatten(0, 1).int())
        there_RD, there_RC = format_.unpack(group.all_to_all(message))
        rows_R = torch.arange(len(there_RD), device=x_tD.device)
        y_XD = experts(there_RD, rows_R.repeat_interleave(most), there_RC.flatten().long())
        back_XD = group.all_to_all(y_XD)

        begin_W = torch.arange(group.size, device=x_tD.device)[:, None, None] * room
        row_t = torch.arange(tokens, device=x_tD.device)[:, None]
        place_WtK = (begin_W + row_t) * most + place_WtK
        rank_tK = choices.slots_TK // choices.width * etp
        place_JtK = torch.stack([place_WtK.gather(0, (rank_tK + j)[None])[0] for j in range(etp)])
        return weighted_sum(back_XD, place_JtK, choices.weights_TK)

    def _places(self, choices: Choices, most: int) -> tuple[Tensor, Tensor]:
        """Return for each rank its choices' slots, -1 behind them, and which of them each one is.

        The second is right only for the rank that a choice goes to.
        """
        layout, width = self._members.layout, choices.width
        rank_tK = choices.slots_TK // width
        first_W = torch.arange(layout.expert_ranks, device=rank_tK.device) // layout.etp
        wants_WtK = rank_tK == first_W[:, None, None]
        slots_WtK = (choices.slots_TK - rank_tK * width).where(wants_WtK, -1)
        order_WtK = (~wants_WtK).to(torch.uint8).argsort(dim=2, stable=True)
        return slots_WtK.gather(2, order_WtK[..., :most]), wants_WtK.cumsum(2) - 1


def bucket_of(rows: int) -> int:
    """Return the least power of two that is at least `rows`."""
    return 1 << max(0, rows - 1).bit_length()
