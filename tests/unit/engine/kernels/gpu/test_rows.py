"""Norms and gates for GPUs against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.rows import NormWeight
from engine.kernels.table import PagedKernels
from tests.unit.engine.kernels.gpu.tensors import DTYPES, apart, assert_near, random

EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    tokens=st.integers(0, 5),
    size=st.integers(1, 300),
    more=st.sampled_from([None, *DTYPES]),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_norm_adds_in_place_and_normalises(
    gpu: PagedKernels,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    size: int,
    more: torch.dtype | None,
    seed: int,
) -> None:
    x_TD = apart(random(seed, tokens, size, dtype=torch.float32, device=device))
    weight_D = random(seed + 1, size, dtype=torch.float32, device=device)
    sum_TD, more_TD = x_TD.clone(), None
    if more is not None:
        more_TD = apart(random(seed + 2, tokens, size, dtype=more, device=device))
        sum_TD = x_TD + more_TD
    found_TD = gpu.rows(dtype).norm(x_TD, more_TD, NormWeight(weight_D * size**0.5, EPS))
    assert found_TD.dtype == dtype
    assert torch.equal(x_TD, sum_TD)
    wide = sum_TD.double()
    exact_TD = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight_D
    assert_near(found_TD, exact_TD, dtype)


def test_norm_of_zeros_is_zero(gpu: PagedKernels, device: torch.device) -> None:
    weight = NormWeight(torch.ones(16, device=device), EPS)
    assert not gpu.rows(torch.float32).norm(torch.zeros(2, 16, device=device), None, weight).any()


@pytest.mark.parametrize("dtype", DTYPES)
@given(tokens=st.integers(0, 4), size=st.integers(1, 1500), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_gate_is_silu_times_up(
    gpu: PagedKernels, device: torch.device, dtype: torch.dtype, tokens: int, size: int, seed: int
) -> None:
    both = apart(10 * random(seed, tokens, 2 * size, dtype=dtype, device=device))
    gate, up = both.double().chunk(2, dim=-1)
    exact = gate * torch.sigmoid(gate) * up
    found = gpu.rows(dtype).gated(both)
    assert found.dtype == dtype
    assert_near(found, exact, dtype)


def test_gate_far_below_zero_is_zero_and_not_nan(gpu: PagedKernels, device: torch.device) -> None:
    both = torch.tensor([[-1e30, 1e30, 2.0, 0.0]], device=device)
    assert gpu.rows(torch.float32).gated(both).tolist() == [[0.0, 0.0]]


def test_gate_keeps_leading_dimensions(gpu: PagedKernels, device: torch.device) -> None:
    assert gpu.rows(torch.float32).gated(torch.ones(2, 3, 8, device=device)).shape == (2, 3, 4)


def test_rows_with_gaps_between_elements_are_refused(
    gpu: PagedKernels, device: torch.device
) -> None:
    with pytest.raises(ValueError, match="stride 2"):
        gpu.rows(torch.float32).gated(torch.ones(2, 16, device=device)[:, ::2])
