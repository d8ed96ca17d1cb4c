"""Cached keys and values on their way into a payload and out of it, bit by bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.gpu import pack_torch
from engine.kernels.gpu.options import Units
from engine.kernels.table import PagedKernels
from kvtransfer.layout import Box, KVShape, Span, uniform
from kvtransfer.memory import KVMemory

DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


def bits(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Any bits, those of NaNs too."""
    width = torch.empty(0, dtype=dtype).element_size()
    *rest, last = shape
    random = torch.Generator().manual_seed(seed)
    made = torch.randint(256, (*rest, last * width), dtype=torch.uint8, generator=random)
    return made.view(dtype).to(device)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@given(
    dtype=st.sampled_from(DTYPES),
    layers=st.integers(1, 2),
    planes=st.integers(1, 2),
    first_head=st.integers(0, 2),
    heads=st.integers(1, 2),
    ratio=st.sampled_from([1, 2, 4]),
    tokens=st.integers(0, 40),
    size=st.sampled_from([1, 12, 64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_a_box_goes_out_and_in_as_the_reference_has_it(
    gpu: PagedKernels,
    device: torch.device,
    dtype: torch.dtype,
    layers: int,
    planes: int,
    first_head: int,
    heads: int,
    ratio: int,
    tokens: int,
    size: int,
    seed: int,
) -> None:
    unit, count = 16 // ratio, 6
    # Every second layer of a pipeline's, say: strides are the cache's own.
    whole = bits(seed, 2 * layers, planes, count, 4, 16, size, dtype=dtype, device=device)
    cache = whole[::2]
    units = -(-tokens // unit)
    at = units_of(units, count, ratio, seed, device, first_head, heads)
    shape = (layers, planes, units, heads, unit, size)

    payload = bits(seed + 1, *shape, dtype=dtype, device=device)
    wanted = payload.clone()
    gpu.move(payload, cache, None, at, unit, tokens)
    pack_torch.move(wanted, cache, None, at, unit, tokens)
    assert same(payload, wanted)

    # A sender that left something behind the last token.
    payload = bits(seed + 2, *shape, dtype=dtype, device=device)
    wanted_whole = whole.clone()
    gpu.move(cache, payload, at, None, unit, tokens)
    pack_torch.move(wanted_whole[::2], payload, at, None, unit, tokens)
    assert same(whole, wanted_whole)


def units_of(
    units: int, blocks: int, ratio: int, seed: int, device: torch.device, first: int, heads: int
) -> Units:
    """So many units, each its own, of some heads."""
    order = torch.randperm(blocks * ratio, generator=torch.Generator().manual_seed(seed))[:units]
    blocks_U, subs_U = (order // ratio).to(device), (order % ratio).to(device)
    return Units(blocks_U, subs_U, slice(first, first + heads))


@given(
    ratios=st.sampled_from([(1, 1), (1, 2), (4, 1), (2, 4)]),
    first_heads=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    heads=st.integers(1, 2),
    tokens=st.integers(0, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_a_box_goes_from_one_cache_to_another_of_other_blocks_and_heads(
    gpu: PagedKernels,
    device: torch.device,
    ratios: tuple[int, int],
    first_heads: tuple[int, int],
    heads: int,
    tokens: int,
    seed: int,
) -> None:
    unit, units, size = 4, -(-tokens // 4), 6
    caches, boxes = [], []
    for number, (ratio, first, all_heads) in enumerate(
        zip(ratios, first_heads, (4, 3), strict=True)
    ):
        count = -(-units // ratio) + 2
        shape = 2, 2, count, all_heads, unit * ratio, size
        caches.append(bits(seed + number, *shape, dtype=torch.bfloat16, device=device))
        boxes.append(units_of(units, count, ratio, seed + number, device, first, heads))
    (source, into), (at, to) = caches, boxes
    payload = source.new_empty(2, 2, units, heads, unit, size)
    pack_torch.move(payload, source, None, at, unit, tokens)
    wanted = into.clone()
    pack_torch.move(wanted, payload, to, None, unit, tokens)

    by_torch = into.clone()
    pack_torch.move(by_torch, source, to, at, unit, tokens)
    gpu.move(into, source, to, at, unit, tokens)
    assert same(by_torch, wanted)
    assert same(into, wanted)


def test_what_does_not_fit_the_box_is_refused(gpu: PagedKernels, device: torch.device) -> None:
    cache = torch.zeros(1, 2, 3, 4, 16, 8, device=device)
    blocks = torch.tensor([0, 1], device=device)
    box = Units(blocks, torch.zeros_like(blocks), slice(0, 4))
    payload = torch.zeros(1, 2, 2, 4, 16, 8, device=device)
    with pytest.raises(ValueError, match="must be alike"):
        gpu.move(payload[:, :1], cache, None, box, 16, 20)
    with pytest.raises(ValueError, match="must be alike"):
        gpu.move(payload.half(), cache, None, box, 16, 20)
    with pytest.raises(ValueError, match="must be alike"):
        gpu.move(payload[:, :, :, :3], cache, None, box, 16, 20)
    with pytest.raises(ValueError, match="as many as they need"):
        gpu.move(payload, cache, None, box, 16, 33)
    with pytest.raises(ValueError, match="must divide"):
        gpu.move(payload, cache, None, box, 12, 20)
    with pytest.raises(ValueError, match="heads 2 to 5 of 4"):
        gpu.move(cache, payload, replace(box, heads=slice(2, 5)), None, 16, 20)
    turned = cache.transpose(4, 5).contiguous().transpose(4, 5)
    with pytest.raises(ValueError, match="contiguous"):
        gpu.move(payload, turned, None, box, 16, 20)


@pytest.mark.parametrize("unit", [2, 4])
def test_the_reference_packs_what_the_transfer_does_on_a_cpu(unit: int) -> None:
    layout = uniform(KVShape(layers=2, kv_heads=3, head_size=8, dtype="float32"), 4)
    cache = bits(1, 2, 2, 5, 3, 4, 8, dtype=torch.float32, device=torch.device("cpu"))
    memory = KVMemory(cache, layout, 0)
    tokens, ratio = 6, 4 // unit
    box = Box(Span(0, 2), Span(1, 3), Span(0, tokens), unit)
    wanted = np.full(memory.payload_bytes(box), 0xAB, np.uint8)
    memory.pack(wanted, memory.table([3, 1], tokens), box)
    units = torch.arange(-(-tokens // unit))
    blocks, subs = torch.tensor([3, 1])[units // ratio], units % ratio
    payload = torch.empty(2, 2, len(units), 2, unit, 8)
    pack_torch.move(payload, cache, None, Units(blocks, subs, slice(1, 3)), unit, tokens)
    assert payload.view(torch.uint8).flatten().tolist() == wanted.tolist()
