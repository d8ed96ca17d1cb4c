"""The choice of a dispatcher: measured by all ranks alike, or set."""

from collections.abc import Callable

import pytest
import torch

from engine.dispatch import Dispatch, Dispatcher, Members
from engine.dispatch.gathered import AllGather
from engine.dispatch.padded import PaddedAllToAll
from engine.errors import UnsupportedError
from tests.unit.engine.dispatch.loopback import on_ranks

CPU = torch.device("cpu")


class Clock:
    """Shows what it was told has passed."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def passing(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now_s += seconds

        return run


def test_ranks_that_measure_differently_choose_alike() -> None:
    def measured(members: Members) -> Dispatch:
        dispatch, clock = Dispatch(members, CPU), Clock()

        def trial(dispatcher: Dispatcher, rows: int) -> Callable[[], object]:
            if isinstance(dispatcher, PaddedAllToAll):
                return clock.passing(0.02)
            # Where there are several rows it is the best for rank 0, but by far not for rank 1.
            is_good = isinstance(dispatcher, AllGather) and (rows == 1 or members.group.rank == 0)
            return clock.passing(0.001 if is_good else 0.06)

        assert dispatch.name_for(2) == "allgather"
        dispatch.measure(trial, 3, clock)
        return dispatch

    for dispatch in on_ranks(measured, dp=2, ep=2):
        assert dispatch.table == {1: "allgather", 2: "padded", 4: "padded"}
        chosen = [dispatch.name_for(rows) for rows in (1, 3, 4, 500)]
        assert chosen == ["allgather", "padded", "padded", "padded"]


def test_a_set_dispatcher_is_not_measured() -> None:
    def measured(members: Members) -> Dispatch:
        def trial(dispatcher: Dispatcher, rows: int) -> Callable[[], object]:
            raise AssertionError

        dispatch = Dispatch(members, CPU, "alltoall")
        dispatch.measure(trial, 64)
        return dispatch

    for dispatch in on_ranks(measured, dp=2):
        assert dispatch.table == {}
        assert {dispatch.name_for(rows) for rows in (1, 64)} == {"alltoall"}


def test_an_unknown_dispatcher_is_refused_with_those_there_are() -> None:
    def make(members: Members) -> None:
        with pytest.raises(UnsupportedError, match="'ring'; there are: auto, allgather"):
            Dispatch(members, CPU, "ring")

    on_ranks(make)
