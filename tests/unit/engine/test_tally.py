"""Calls and bytes of collectives."""

import torch

from engine.dispatch import Members
from engine.parallel import Alone
from engine.tally import Count, CountedCollectives, CountedExperts, Tally
from tests.unit.engine.dispatch.loopback import on_ranks


def test_what_goes_to_other_ranks_is_counted() -> None:
    def on_rank(members: Members) -> None:
        tally = Tally()
        group = CountedExperts(members.group, tally)
        assert (group.size, group.rank) == (2, members.group.rank)
        give, take = ([3, 1], [3, 2]) if group.rank == 0 else ([2, 2], [1, 2])
        x = torch.ones(4, 5)
        assert len(group.all_to_all(x, give, take)) == sum(take)
        assert torch.equal(group.all_reduce(x.clone()), 2 * x)
        assert group.all_gather(x).shape == (8, 5)
        assert torch.equal(group.reduce_scatter(x), 2 * x[:2])
        assert tally.take() == {
            "all_to_all": Count(1, (1 if group.rank == 0 else 2) * 20),
            "expert_all_reduce": Count(1, 80),
            "expert_all_gather": Count(1, 80),
            "expert_reduce_scatter": Count(1, 40),
        }
        assert group.all_to_all(torch.ones(2, 5)).shape == (2, 5)
        assert group.all_to_all(torch.ones(0, 5), [0, 0], [0, 0]).shape == (0, 5)
        assert tally.take() == {"all_to_all": Count(2, 20)}

    on_ranks(on_rank, dp=2)


def test_calls_with_nothing_in_them_are_not_counted() -> None:
    tally = Tally()
    ranks = CountedCollectives(Alone(), tally)
    for rows in (0, 3):
        x = torch.ones(rows, 2)
        ranks.all_reduce(x)
        ranks.all_gather(x, 2)
        ranks.all_gather_rows(x, rows)
        ranks.reduce_scatter(x)
    assert tally.kinds == {
        kind: Count(1, 24)
        for kind in ("all_reduce", "all_gather", "all_gather_rows", "reduce_scatter")
    }
