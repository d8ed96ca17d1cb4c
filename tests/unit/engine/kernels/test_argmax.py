"""The greatest of a row, compiled and torch's, where numbers are equal or none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.kernels import argmax_cpu

Find = Callable[[Tensor], list[int]]


@pytest.fixture(params=["compiled", "torch"])
def argmax(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Find:
    if request.param == "torch":
        monkeypatch.setattr(argmax_cpu, "_native", lambda: None)
    elif argmax_cpu._native() is None:
        pytest.skip("there is no C++ compiler")
    return argmax_cpu.argmax


@pytest.mark.parametrize("size", [1, 15, 4096, 4097, 32_000])
def test_it_is_where_the_greatest_is(argmax: Find, size: int) -> None:
    x_SV = torch.randn(20, size, generator=torch.Generator().manual_seed(size))
    assert argmax(x_SV) == [row.index(max(row)) for row in x_SV.tolist()]


def test_rows_may_lie_apart(argmax: Find) -> None:
    x_SV = torch.randn(20, 50)
    assert argmax(x_SV[::3, 10:40]) == argmax(x_SV[::3, 10:40].clone())


@pytest.mark.parametrize("places", [(0, 1), (7, 9000), (4095, 4096), (8999, 9999)])
@pytest.mark.parametrize("value", [torch.inf, 1.0, torch.nan])
def test_first_of_equals_is_found(argmax: Find, places: tuple[int, int], value: float) -> None:
    x_1V = -torch.rand(1, 10_000)
    x_1V[0, list(places)] = value
    assert argmax(x_1V) == [places[0]]


def test_nan_counts_as_greatest(argmax: Find) -> None:
    x_1V = torch.full((1, 10_000), torch.inf)
    x_1V[0, 9_500] = torch.nan
    assert argmax(x_1V) == [9_500]


def test_first_is_found_where_all_are_impossible(argmax: Find) -> None:
    assert argmax(torch.full((3, 5000), -torch.inf)) == [0, 0, 0]
