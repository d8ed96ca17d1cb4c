"""Where experts are, and whose turn it is."""

import pytest
import torch

from engine.dispatch import ExpertMap
from engine.errors import UnsupportedError
from engine.parallel import Layout

CPU = torch.device("cpu")


@pytest.mark.parametrize(("experts", "sizes"), [(8, [2] * 4), (5, [1, 1, 1, 2]), (4, [1] * 4)])
def test_even_parts_differ_by_one_at_most(experts: int, sizes: list[int]) -> None:
    found = ExpertMap.even(experts, Layout(dp=2, tp=2, ep=4))
    assert [expert for held in found.slots for expert in held] == list(range(experts))
    assert list(map(len, found.slots)) == sizes


def test_replicas_take_turns_by_position() -> None:
    tables = ExpertMap(3, ((0, 1), (2, 0), (0, 2))).tables(CPU)
    experts_TK = torch.tensor([[0, 1], [0, 2], [2, 0], [1, 0]])
    # Slots of 0 are 0, 3 and 4, of 1 it is 1, of 2 they are 2 and 5.
    assert tables.look_up(experts_TK, 0).tolist() == [[0, 1], [3, 5], [2, 4], [1, 0]]
    assert tables.look_up(experts_TK[2:], 2).tolist() == [[2, 4], [1, 0]]


def test_without_replicas_every_expert_has_its_slot() -> None:
    tables = ExpertMap(3, ((2,), (0, 1))).tables(CPU)
    assert tables.look_up(torch.tensor([[0, 1, 2]]), 5).tolist() == [[2, 3, 0]]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (((0, 1), (1,)), r"no ep rank has the experts \[2\]"),
        (((0, 1, 2), ()), "ep rank 1 needs some of 3 experts"),
        (((0, 1, 1), (2,)), r"ep rank 0 .* each once; found \[0, 1, 1\]"),
        (((0, 1), (2, 3)), r"ep rank 1 .* found \[2, 3\]"),
    ],
)
def test_a_map_that_cannot_be_is_refused(slots: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ExpertMap(3, slots)
