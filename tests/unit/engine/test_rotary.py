"""Rotary angles come from a table that grows, whoever makes it grow meanwhile."""

from typing import Any

import pytest
import torch

from engine.layers.rotary import Angles, Rotary
from engine.rope import Rope

HEAD, THETA = 16, 10_000.0
ROPE = Rope(theta=THETA)
CPU = torch.device("cpu")


def computed(positions: list[int]) -> Angles:
    frequencies = 1 / THETA ** (torch.arange(0, HEAD, 2).double() / HEAD)
    angles = torch.tensor(positions)[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return Angles(torch.cat((cos, cos), -1).float(), torch.cat((-sin, sin), -1).float())


def assert_right(found: Angles, positions: list[int]) -> None:
    expected = computed(positions)
    torch.testing.assert_close(found.cos_T1H, expected.cos_T1H, atol=2e-3, rtol=0)
    torch.testing.assert_close(found.sin_T1H, expected.sin_T1H, atol=2e-3, rtol=0)


def test_any_position_has_its_angles() -> None:
    rotary = Rotary(HEAD, ROPE, CPU)
    for positions in ([0, 5], [1023, 1024], [7000, 3], [2048, 8191, 8192]):
        assert_right(rotary.angles(torch.tensor(positions), max(positions) + 1), positions)


class Interrupted(Rotary):
    """Another thread grows the table between a thread's first look at it and the next one."""

    other: int | None = None
    looks = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "_table" and self.other is not None:
            self.looks += 1
            if self.looks == 2:
                other, self.other = self.other, None
                self.angles(torch.tensor([other]), other + 1)
        return super().__getattribute__(name)


@pytest.mark.parametrize("other", [1500, 9000])
def test_growing_is_right_while_another_thread_grows_it_too(other: int) -> None:
    rotary = Interrupted(HEAD, ROPE, CPU)
    rotary.other = other
    positions = [1100, 5000]
    assert_right(rotary.angles(torch.tensor(positions), 5001), positions)
