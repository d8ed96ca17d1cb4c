"""New tokens' heads on their way into the cache, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.gpu import insert_torch
from engine.kernels.rows import NormWeight, TorchRows
from engine.kernels.table import PagedKernels
from engine.layers.rotary import Rotary
from engine.rope import Rope
from tests.unit.engine.kernels.gpu.tensors import DTYPES, apart, assert_near, random

EPS = 1e-6
CPU = torch.device("cpu")


def weights(
    seed: int, heads: int, size: int, device: torch.device, eps: float | None = EPS
) -> NormWeight:
    return NormWeight(1 + random(seed, heads, size, dtype=torch.float32, device=device) / 4, eps)


def angles(seed: int, tokens: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    positions_T = torch.randint(1000, (tokens,), generator=torch.Generator().manual_seed(seed))
    found = Rotary(size, Rope(theta=1e4), CPU).angles(positions_T, 1000)
    return found.cos_T1H.to(device), found.sin_T1H.to(device)


def slots(seed: int, tokens: int, heads: int, cells: int, device: torch.device) -> Tensor:
    """Distinct cells, some of them none."""
    order = torch.randperm(cells, generator=torch.Generator().manual_seed(seed))
    slots_TX = order[: tokens * heads].view(tokens, heads)
    if tokens > 1:
        slots_TX[0] = -1
        slots_TX[1, 0] = cells
    return slots_TX.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    tokens=st.integers(0, 4),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 5),
    half=st.integers(1, 48),
    eps=st.sampled_from([EPS, None]),
    seed=st.integers(0, 99),
)
@settings(max_examples=10, deadline=None)
def test_rotate_insert_turns_in_place_and_writes_only_named_cells(
    gpu: PagedKernels,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    kv_heads: int,
    shared: int,
    half: int,
    eps: float | None,
    seed: int,
) -> None:
    size, turned = 2 * half, kv_heads * (shared + 1)
    qkv = apart(random(seed, tokens, turned + kv_heads, size, dtype=dtype, device=device))
    exact = qkv.double()
    norm = weights(seed, turned, size, device, eps)
    cos, sin = angles(seed, tokens, size, device)
    cells = torch.full((40, size), torch.nan, dtype=dtype, device=device)
    exact_cells = cells.double()
    slots_TX = slots(seed, tokens, 2 * kv_heads, 40, device)
    values = qkv[:, turned:].clone()

    gpu.rotate_insert(qkv, norm, cos, sin, cells, slots_TX)

    wide = NormWeight(norm.weight.double(), eps)
    insert_torch.rotate_insert(exact, wide, cos, sin, exact_cells, slots_TX)
    assert_near(qkv, exact, dtype)
    assert torch.equal(qkv[:, turned:], values)
    assert torch.equal(cells.isnan(), exact_cells.isnan())
    assert_near(cells.nan_to_num(), exact_cells.nan_to_num(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_turning_and_inserting_apart_give_what_both_at_once_do(
    gpu: PagedKernels, device: torch.device, dtype: torch.dtype
) -> None:
    qkv = random(1, 3, 8, 16, dtype=dtype, device=device)
    norm = weights(2, 6, 16, device)
    cos, sin = angles(3, 3, 16, device)
    slots_TX = slots(4, 3, 4, 20, device)
    cells = torch.zeros(20, 16, dtype=dtype, device=device)
    apart_qkv, apart_cells = qkv.clone(), cells.clone()
    gpu.rotate_insert(qkv, norm, cos, sin, cells, slots_TX)
    rows = gpu.rows(dtype)
    rows.norm_rotate(apart_qkv[:, :6], norm, cos, sin)
    rows.insert(apart_cells, slots_TX, apart_qkv[:, 4:])
    assert torch.equal(apart_qkv, qkv)
    assert torch.equal(apart_cells, cells)


def test_values_are_copied_bit_by_bit_even_where_they_are_no_numbers(
    gpu: PagedKernels, device: torch.device
) -> None:
    x = torch.tensor([[[float("nan"), float("inf"), -0.0, 1e-40]]], device=device)
    cells = torch.zeros(2, 4, device=device)
    gpu.rows(torch.float32).insert(cells, torch.tensor([[1]], device=device), x)
    assert torch.equal(cells[1].view(torch.int32), x[0, 0].view(torch.int32))
    assert not cells[0].any()


def test_heads_without_halves_are_refused(gpu: PagedKernels, device: torch.device) -> None:
    with pytest.raises(ValueError, match="even"):
        gpu.rows(torch.float32).insert(
            torch.zeros(2, 3, device=device),
            torch.zeros(1, 1, dtype=torch.int64, device=device),
            torch.zeros(1, 1, 3, device=device),
        )


def test_a_norm_for_other_heads_is_refused(gpu: PagedKernels, device: torch.device) -> None:
    qkv, cells = torch.zeros(1, 4, 8, device=device), torch.zeros(9, 8, device=device)
    slots_TX = torch.zeros(1, 2, dtype=torch.int64, device=device)
    cos, sin = angles(0, 1, 8, device)
    with pytest.raises(ValueError, match="a row for each"):
        gpu.rotate_insert(qkv, weights(0, 2, 8, device), cos, sin, cells, slots_TX)


@pytest.mark.parametrize("eps", [EPS, None])
def test_the_reference_does_what_the_engine_does_on_a_cpu(eps: float | None) -> None:
    qkv = random(1, 3, 8, 16, dtype=torch.float32, device=CPU)
    norm, (cos, sin) = weights(2, 6, 16, CPU, eps), angles(3, 3, 16, CPU)
    slots_TX = torch.randperm(12, generator=torch.Generator().manual_seed(4)).view(3, 4)
    cells, engine_cells, engine_qkv = torch.zeros(12, 16), torch.zeros(12, 16), qkv.clone()
    insert_torch.rotate_insert(qkv, norm, cos, sin, cells, slots_TX)
    rows = TorchRows(torch.float32)
    rows.norm_rotate(engine_qkv[:, :6], norm, cos, sin)
    rows.insert(engine_cells, slots_TX, engine_qkv[:, 4:])
    assert_near(qkv, engine_qkv, torch.float32)
    assert_near(cells, engine_cells, torch.float32)
