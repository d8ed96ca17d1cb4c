"""Parts of attention put together, against attention over all keys at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.gpu import merge_torch
from engine.kernels.gpu.options import Seen, full
from engine.kernels.table import PagedKernels, paged_kernels
from engine.ring.merge import Partial
from tests.unit.engine.kernels.gpu.tensors import apart, assert_near, random

CPU = torch.device("cpu")
Attended = tuple[Tensor, Tensor]


def attended(
    seed: int, tokens: int, heads: int, size: int, cut: int, device: torch.device
) -> tuple[Attended, Attended, Attended]:
    """Return attention over all of 20 keys, and over those before and from `cut` on, in fp32."""
    dtype = torch.float32
    q = random(seed, tokens, heads, size, dtype=dtype, device=device)
    k, v = (random(seed + i, 20, heads, size, dtype=dtype, device=device) for i in (1, 2))
    block = paged_kernels(CPU).block
    both = full(tokens, 20, device)
    low = both.low_T
    before, after = Seen(low, low + cut, cut), Seen(low + cut, low + 20, 20)
    return block(q, k, v, both), block(q, k, v, before), block(q, k, v, after)


@given(
    tokens=st.integers(0, 5),
    heads=st.integers(1, 5),
    size=st.integers(1, 130),
    cut=st.integers(0, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_two_parts_make_the_whole(
    gpu: PagedKernels,
    device: torch.device,
    tokens: int,
    heads: int,
    size: int,
    cut: int,
    seed: int,
) -> None:
    whole, first, second = attended(seed, tokens, heads, size, cut, device)
    out, lse, other, other_lse = map(apart, (*first, *second))
    gpu.merge(out, lse, other, other_lse)
    assert_near(out, whole[0], torch.float32)
    assert_near(lse, whole[1], torch.float32)


def test_what_saw_no_key_is_not_read(gpu: PagedKernels, device: torch.device) -> None:
    out = random(1, 3, 1, 8, dtype=torch.float32, device=device)
    lse = torch.tensor([[0.5], [-torch.inf], [-torch.inf]], device=device)
    other = random(2, 3, 1, 8, dtype=torch.float32, device=device)
    other_lse = torch.tensor([[-torch.inf], [2.0], [-torch.inf]], device=device)
    mine, theirs = out[0].clone(), other[1].clone()
    out[1:], other[0], other[2] = torch.nan, torch.nan, torch.nan
    gpu.merge(out, lse, other, other_lse)
    assert torch.equal(out[0], mine)
    assert torch.equal(out[1], theirs)
    assert not out[2].any()
    assert lse.flatten().tolist() == [0.5, 2.0, -torch.inf]


def test_weights_far_apart_neither_overflow_nor_vanish(
    gpu: PagedKernels, device: torch.device
) -> None:
    out, other = torch.ones(2, 1, 4, device=device), torch.full((2, 1, 4), 3.0, device=device)
    lse = torch.tensor([[3e4], [-3e4]], device=device)
    gpu.merge(out, lse, other, -lse)
    assert out[:, 0, 0].tolist() == [1.0, 3.0]
    assert lse.flatten().tolist() == [3e4, 3e4]


def test_many_parts_are_merged_in_one_call(gpu: PagedKernels, device: torch.device) -> None:
    from engine.kernels.gpu.merge import merge_parts

    parts = random(1, 2, 3, 11, 20, dtype=torch.float32, device=device)
    lses = 3 * random(2, 2, 3, 11, dtype=torch.float32, device=device)
    lses[0, 0, ::2] = -torch.inf
    lses[1, 2] = -torch.inf
    exact = torch.einsum("tnc,tnch->tnh", lses.double().softmax(-1).nan_to_num(), parts.double())
    exact_lse = lses.double().logsumexp(-1)
    parts[lses == -torch.inf] = torch.nan
    out, lse = torch.empty(2, 3, 20, device=device), torch.empty(2, 3, device=device)
    merge_parts(parts, lses, out, lse)
    assert_near(out, exact, torch.float32)
    assert_near(lse, exact_lse, torch.float32)


@pytest.mark.parametrize("cut", [0, 7, 20])
def test_the_reference_does_what_the_ring_does(cut: int) -> None:
    _, first, second = attended(5, 4, 2, 8, cut, CPU)
    partials = []
    for out, lse in (first, second):
        partial = Partial.undefined(out)
        partial.out_TNH.copy_(out)
        partial.lse_TN.copy_(lse)
        partials.append(partial)
    partials[0].merge(partials[1])
    merge_torch.merge(*first, *second)
    assert_near(first[0], partials[0].out_TNH, torch.float32)
    assert_near(first[1], partials[0].lse_TN, torch.float32)
