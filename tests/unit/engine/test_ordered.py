"""Sums over ranks that are made in the order of the ranks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from engine.ordered import OrderedCollectives, OrderedExperts
from engine.parallel import Layout
from tests.unit.engine.dispatch.loopback import LoopbackExperts, Meeting

# In fp32 the first two cancel: only one order gives one.
TERMS = (1e8, -1e8, 1.0)


class Side:
    """Tensor-parallel ranks, whose columns are gathered as rows of a group are."""

    def __init__(self, group: LoopbackExperts) -> None:
        self._group = group

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        return torch.cat(list(self._group.all_gather(x).chunk(self._group.size)), -1)[..., :width]

    def all_reduce(self, x: Tensor) -> Tensor:
        raise AssertionError("its order is not known")

    def reduce_scatter(self, x: Tensor) -> Tensor:
        raise AssertionError("its order is not known")

    def all_gather_rows(self, x: Tensor, rows: int) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("what", ["tp", "experts", "rows"])
def test_terms_are_added_in_the_order_of_the_ranks(what: str) -> None:
    meeting = Meeting(3)

    def run(rank: int) -> Tensor:
        group = LoopbackExperts(3, rank, meeting)
        x = torch.full((4, 5), TERMS[rank])
        if what == "experts":
            return OrderedExperts(group).all_reduce(x)
        ranks = OrderedCollectives(Side(group), Layout(tp=3, tp_rank=rank))
        return ranks.all_reduce(x) if what == "tp" else ranks.reduce_scatter(x)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, range(3)))
    assert [len(x) for x in found] == ([2, 2, 0] if what == "rows" else [4, 4, 4])
    assert all(torch.equal(x, torch.ones_like(x)) for x in found)
