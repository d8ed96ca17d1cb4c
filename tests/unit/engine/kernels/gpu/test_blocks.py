"""Blocks on their way between a cache and another memory of its shape, bit by bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.gpu import blocks_torch
from engine.kernels.table import PagedKernels
from tests.unit.engine.kernels.gpu.test_pack import DTYPES, bits, same


@given(
    dtype=st.sampled_from(DTYPES),
    layers=st.integers(1, 3),
    first=st.integers(0, 2),
    planes=st.integers(1, 2),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 12, 640]),
    chosen=st.sets(st.integers(0, 6), max_size=6),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_named_blocks_come_over_and_no_others(
    gpu: PagedKernels,
    device: torch.device,
    dtype: torch.dtype,
    layers: int,
    first: int,
    planes: int,
    heads: int,
    size: int,
    chosen: set[int],
    seed: int,
) -> None:
    shape = first + layers + 1, planes, 7, heads, 8, size
    source, target = (bits(seed + i, *shape, dtype=dtype, device=device) for i in range(2))
    wanted = target.clone()
    ids = torch.tensor(sorted(chosen, reverse=bool(seed % 2)), dtype=torch.int32, device=device)
    part = range(first, first + layers)
    gpu.copy_blocks(target, source, part, ids)
    blocks_torch.copy_blocks(wanted, source, part, ids)
    assert same(target, wanted)


def test_memories_that_are_not_alike_are_refused(gpu: PagedKernels, device: torch.device) -> None:
    cache = torch.zeros(2, 2, 4, 1, 2, 8, device=device)
    ids = torch.zeros(1, dtype=torch.int32, device=device)
    for other in (cache[:1], cache.half(), cache.transpose(0, 1)):
        with pytest.raises(ValueError, match="contiguous and alike"):
            gpu.copy_blocks(other, cache, range(1), ids)
