"""Attention of a prompt's or a ring's blocks, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.gpu import block_torch
from engine.kernels.gpu.options import Seen, causal, full
from engine.kernels.gpu.tune import Tile
from engine.kernels.table import PagedKernels
from tests.unit.engine.kernels.gpu.tensors import DTYPES, apart, assert_near, cached, random

SMALL = Tile(rows=16, keys=16, warps=4, stages=2)
CPU = torch.device("cpu")


def queries(seed: int, tokens: int, heads: int, size: int, like: Tensor) -> Tensor:
    made = random(seed, tokens, heads, size, dtype=like.dtype, device=like.device)
    return apart(made / size**0.5)


def check(
    gpu: PagedKernels,
    q_TNH: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    table_B: Tensor | None = None,
    soft_cap: float | None = None,
    tile: Tile = SMALL,
) -> None:
    options = {"table_B": table_B, "scale": 1.5, "soft_cap": soft_cap}
    out, lse = gpu.block(q_TNH, k, v, seen, **options, tile=tile)
    exact, exact_lse = block_torch.block(
        q_TNH.double(),
        k.double(),
        v.double(),
        seen,
        table_B=table_B,
        scale=1.5,
        soft_cap=soft_cap,
    )
    assert out.dtype == lse.dtype == torch.float32
    assert_near(out, exact, q_TNH.dtype)
    assert_near(lse, exact_lse, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_paged", [False, True])
@given(
    tokens=st.integers(0, 40),
    keys=st.integers(0, 70),
    kv_heads=st.integers(1, 2),
    shared=st.integers(1, 3),
    size=st.sampled_from([64, 80]),
    offset=st.one_of(st.none(), st.integers(-20, 80)),
    window=st.one_of(st.none(), st.integers(1, 40)),
    soft_cap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_queries_see_the_keys_they_may_and_no_others(
    gpu: PagedKernels,
    device: torch.device,
    dtype: torch.dtype,
    is_paged: bool,
    tokens: int,
    keys: int,
    kv_heads: int,
    shared: int,
    size: int,
    offset: int | None,
    window: int | None,
    soft_cap: float | None,
    seed: int,
) -> None:
    if offset is None:
        seen = full(tokens, keys, device)
    else:
        seen = causal(tokens, keys, offset, device, window)
    table_B = None
    if is_paged:
        cache = cached(
            seed, [keys], kv_heads=kv_heads, places=16, size=size, dtype=dtype, device=device
        )
        k, v, table_B = cache.k_BGPH, cache.v_BGPH, cache.tables_SB[0]
    else:
        # As a projection gives them: heads of K, then of V.
        kv = apart(random(seed, keys, 2 * kv_heads, size, dtype=dtype, device=device))
        k, v = kv[:, :kv_heads], kv[:, kv_heads:]
    q_TNH = queries(seed + 1, tokens, kv_heads * shared, size, k)
    check(gpu, q_TNH, k, v, seen, table_B, soft_cap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 96, 256, 512])
def test_heads_of_any_size(
    gpu: PagedKernels, device: torch.device, dtype: torch.dtype, size: int
) -> None:
    k, v = (random(seed, 40, 1, size, dtype=dtype, device=device) for seed in (1, 2))
    check(gpu, queries(3, 20, 2, size, k), k, v, causal(20, 40, 17, device))


@pytest.mark.parametrize(("size", "value_size"), [(192, 128), (64, 16), (48, 40)])
def test_values_of_another_size(
    gpu: PagedKernels, device: torch.device, size: int, value_size: int
) -> None:
    kv = random(1, 40, 4, size, dtype=torch.bfloat16, device=device)
    kv[:, 2:, value_size:] = torch.nan  # behind values is anything
    k, v = kv[:, :2], kv[:, 2:, :value_size]
    check(gpu, queries(3, 20, 4, size, k), k, v, causal(20, 40, 17, device))


def test_windows_wider_than_a_tile(gpu: PagedKernels, device: torch.device) -> None:
    k, v = (random(seed, 80, 1, 64, dtype=torch.float32, device=device) for seed in (1, 2))
    check(gpu, queries(3, 16, 1, 64, k), k, v, causal(16, 80, 60, device, window=50))


def test_keys_behind_those_that_are_seen_are_not_read(
    gpu: PagedKernels, device: torch.device
) -> None:
    k, v = (random(seed, 50, 1, 64, dtype=torch.float32, device=device) for seed in (1, 2))
    k[30:], v[30:] = torch.nan, torch.nan
    out, lse = gpu.block(queries(3, 10, 2, 64, k), k, v, causal(10, 50, 20, device), tile=SMALL)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_queries_before_all_keys_give_zeros_and_no_weight(
    gpu: PagedKernels, device: torch.device
) -> None:
    k, v = (random(seed, 20, 1, 64, dtype=torch.float32, device=device) for seed in (1, 2))
    out, lse = gpu.block(queries(3, 6, 1, 64, k), k, v, causal(6, 20, -4, device), tile=SMALL)
    assert not out[:4].any()
    assert (lse[:4] == -torch.inf).all()
    assert lse[4:].isfinite().all()


def test_heads_that_do_not_fit_are_refused(gpu: PagedKernels, device: torch.device) -> None:
    q, k = torch.ones(2, 3, 64, device=device), torch.ones(4, 2, 64, device=device)
    with pytest.raises(ValueError, match="3 query heads"):
        gpu.block(q, k, k, causal(2, 4, 0, device))


def test_shares_of_a_ring_may_lie_apart(gpu: PagedKernels, device: torch.device) -> None:
    at_T = torch.tensor([*range(16, 24), *range(40, 48)])  # grains of one rank
    at_L = torch.tensor([*range(8, 16), *range(24, 32), *range(48, 56)])  # and of another
    high_T = torch.searchsorted(at_L, at_T, right=True).int().to(device)
    seen = Seen(torch.zeros_like(high_T), high_T, 24)
    k, v = (random(seed, 24, 2, 64, dtype=torch.float32, device=device) for seed in (1, 2))
    check(gpu, queries(3, 16, 4, 64, k), k, v, seen)


def test_results_go_where_they_are_wanted(gpu: PagedKernels, device: torch.device) -> None:
    k, v = (random(seed, 9, 1, 64, dtype=torch.float32, device=device) for seed in (1, 2))
    q_TNH, seen = queries(3, 9, 2, 64, k), causal(9, 9, 0, device)
    out = torch.full((12, 2, 64), torch.nan, device=device)
    lse = torch.full((12, 2), torch.nan, device=device)
    gpu.block(q_TNH, k, v, seen, out_TNV=out[1:10], lse_TN=lse[1:10], tile=SMALL)
    wanted, wanted_lse = gpu.block(q_TNH, k, v, seen, tile=SMALL)
    assert torch.equal(out[1:10], wanted)
    assert torch.equal(lse[1:10], wanted_lse)
    assert out[[0, 10, 11]].isnan().all()
    assert lse[[0, 10, 11]].isnan().all()


def test_the_reference_is_attention() -> None:
    q, k, v = (random(seed, 12, 4, 8, dtype=torch.float64, device=CPU) for seed in (1, 2, 3))
    out, lse = block_torch.block(q, k, v, causal(12, 12, 0, CPU), scale=8**-0.5)
    q_NTH, k_NTH, v_NTH = (each.transpose(0, 1) for each in (q, k, v))
    wanted = F.scaled_dot_product_attention(q_NTH, k_NTH, v_NTH, is_causal=True)
    torch.testing.assert_close(out, wanted.transpose(0, 1))
    scores = torch.einsum("tnh,lnh->tnl", q, k)[5, :, :6] * 8**-0.5
    torch.testing.assert_close(lse[5], scores.exp().sum(-1).log())
