"""What each way sends, against what theory says for routings that are known."""

import pytest
import torch
from torch import Tensor

from engine.dispatch import DISPATCHERS, ExpertMap, Members
from engine.dispatch.message import RowFormat
from engine.tally import Count, CountedExperts, Tally
from tests.unit.engine.dispatch.loopback import on_ranks
from tests.unit.engine.dispatch.test_dispatchers import EXPERTS, HIDDEN, LAYOUTS, Chosen, rows_for

TOP_K = 3


def counted(
    dispatcher: str, layout: dict[str, int], rows: list[int], seed: int
) -> list[tuple[Members, Tensor, dict[str, Count]]]:
    """Return each rank's members, its dp rank's choices, and what it sent."""

    def on_rank(members: Members) -> tuple[Members, Tensor, dict[str, Count]]:
        tally = Tally()
        heard = Members(
            layout=members.layout, group=CountedExperts(members.group, tally), tp=members.tp
        )
        own = rows[members.layout.dp_rank]
        router = Chosen(members, own, TOP_K, seed, ExpertMap.even(EXPERTS, members.layout))

        def pairs(x_RD: Tensor, tokens_P: Tensor, slots_P: Tensor) -> Tensor:
            return x_RD.new_zeros(len(tokens_P), HIDDEN)

        DISPATCHERS[dispatcher](heard)(torch.ones(own, HIDDEN), router, pairs, max(rows))
        return members, router.experts_TK, tally.kinds

    return on_ranks(on_rank, **layout)


def wanted_by(members: Members, experts_TK: Tensor) -> Tensor:
    """Return which of a rank's part of the tokens want an expert of each rank: [W, t, K]."""
    layout = members.layout
    own_tK = experts_TK[layout.ragged_part(len(experts_TK))]
    ep_rank_of = torch.empty(EXPERTS, dtype=torch.int64)
    for ep_rank in range(layout.ep):
        part = layout.expert_part(EXPERTS, ep_rank)
        ep_rank_of[part.start : part.stop] = ep_rank
    each_W = torch.arange(layout.expert_ranks) // layout.etp
    return ep_rank_of[own_tK] == each_W[:, None, None]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_sends_a_row_once_to_each_rank_that_wants_it_and_every_output_back(
    layout: dict[str, int], seed: int
) -> None:
    ran = counted("alltoall", layout, rows_for(layout, seed), seed)
    wants = [wanted_by(members, experts_TK) for members, experts_TK, _ in ran]
    row_bytes = RowFormat(TOP_K, HIDDEN, torch.float32).row_bytes
    for rank, (_, _, kinds) in enumerate(ran):
        others = [each for each in range(len(ran)) if each != rank]
        counts = len(others) * 2 * 8  # rows and pairs, int64
        there = sum(int(wants[rank][each].any(1).sum()) for each in others) * row_bytes
        back = sum(int(wants[each][rank].sum()) for each in others) * HIDDEN * 4
        assert kinds == {"all_to_all": Count(3, counts + there + back)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_padded_sends_as_much_whatever_is_chosen(layout: dict[str, int]) -> None:
    for seed in range(3):
        rows = rows_for(layout, seed)
        for members, _, kinds in counted("padded", layout, rows, seed):
            degrees = members.layout
            bucket = 1 << (max(rows) - 1).bit_length()
            room, others = -(-bucket // degrees.tp), degrees.expert_ranks - 1
            most = min(TOP_K, EXPERTS // degrees.ep)
            row_bytes = RowFormat(most, HIDDEN, torch.float32).row_bytes
            size = others * room * (row_bytes + most * HIDDEN * 4)
            assert kinds == {"all_to_all": Count(2, size)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_gather_sends_every_row_once_and_sums_back(layout: dict[str, int]) -> None:
    rows = rows_for(layout, 2)
    for members, _, kinds in counted("allgather", layout, rows, 2):
        degrees = members.layout
        if degrees.dp == 1:
            assert kinds == {"expert_all_reduce": Count(1, rows[0] * HIDDEN * 4)}
            continue
        room = -(-max(rows) // degrees.tp)
        row_bytes = RowFormat(2 * TOP_K, HIDDEN, torch.float32).row_bytes
        sums = (degrees.expert_ranks - 1) * room * HIDDEN * 4
        assert kinds == {
            "expert_all_gather": Count(1, room * row_bytes),
            "expert_reduce_scatter": Count(1, sums),
        }
