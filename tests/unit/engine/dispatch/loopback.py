"""Ranks that share experts as threads of one process, each with its dispatcher."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.dispatch import Members
from engine.parallel import Layout

T = TypeVar("T")


class Meeting:
    """Where the ranks of a group hand each other what they have."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=20)
        self._given: list[Any] = [None] * size

    def exchange(self, rank: int, given: T) -> list[T]:
        """Return what all ranks gave."""
        self._given[rank] = given
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found


class LoopbackExperts:
    """See parallel.ExpertGroup."""

    def __init__(self, size: int, rank: int, meeting: Meeting) -> None:
        self.size = size
        self.rank = rank
        self._meeting = meeting

    def all_to_all(
        self, x: Tensor, give: Sequence[int] | None = None, take: Sequence[int] | None = None
    ) -> Tensor:
        """See ExpertGroup."""
        sizes = [len(x) // self.size] * self.size if give is None else list(give)
        parts = torch.split(x, sizes)
        found = [each[self.rank] for each in self._meeting.exchange(self.rank, parts)]
        assert take is None or list(take) == list(map(len, found))
        return torch.cat(found)

    def all_gather(self, x: Tensor) -> Tensor:
        """See ExpertGroup."""
        return torch.cat(self._meeting.exchange(self.rank, x))

    def all_reduce(self, x: Tensor) -> Tensor:
        """See ExpertGroup."""
        return torch.stack(self._meeting.exchange(self.rank, x.clone())).sum(0)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See ExpertGroup."""
        return self.all_reduce(x).chunk(self.size)[self.rank]


class LoopbackTensorRanks:
    """See parallel.Collectives; without sequence parallelism."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self._rank = rank
        self._meeting = meeting

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Collectives."""
        return torch.stack(self._meeting.exchange(self._rank, x.clone())).sum(0)

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        """See Collectives."""
        return torch.cat(self._meeting.exchange(self._rank, x), -1)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See Collectives."""
        raise NotImplementedError

    def all_gather_rows(self, x: Tensor, rows: int) -> Tensor:
        """See Collectives."""
        found = torch.cat(self._meeting.exchange(self._rank, x))
        assert len(found) == rows
        return found


def on_ranks(run: Callable[[Members], T], *, dp: int = 1, tp: int = 1, ep: int = 1) -> list[T]:
    """Run a function on every rank at the same time; return what each returned."""
    together, of_dp = Meeting(dp * tp), [Meeting(tp) for _ in range(dp)]

    def members(rank: int) -> Members:
        layout = Layout(dp=dp, dp_rank=rank // tp, tp=tp, tp_rank=rank % tp, ep=ep)
        return Members(
            layout=layout,
            group=LoopbackExperts(dp * tp, rank, together),
            tp=LoopbackTensorRanks(layout.tp_rank, of_dp[layout.dp_rank]),
        )

    with ThreadPoolExecutor(dp * tp) as pool:
        return list(pool.map(run, map(members, range(dp * tp))))
