"""Attention of decoding sequences over a paged cache, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.gpu import decode_torch
from engine.kernels.gpu.options import DecodeOptions
from engine.kernels.gpu.tune import Tile
from engine.kernels.table import PagedKernels
from tests.unit.engine.kernels.gpu.tensors import (
    BATCHES,
    DTYPES,
    LENGTHS,
    Cached,
    apart,
    assert_near,
    cached,
    random,
)

SMALL = Tile(keys=16, warps=4, stages=2)


def check(
    gpu: PagedKernels, cache: Cached, seed: int, shared: int, options: DecodeOptions, tile: Tile
) -> None:
    k = cache.k_BGPH
    sequences = len(cache.lengths_S)
    q = random(seed, sequences, k.shape[1] * shared, k.shape[3], dtype=k.dtype, device=k.device)
    q_SNH = apart(q / k.shape[3] ** 0.5)
    longest = int(cache.lengths_S.max()) if sequences else 0
    tables, lengths = cache.tables_SB, cache.lengths_S
    k, v = cache.k_BGPH, cache.v_BGPH
    out, lse = gpu.decode(q_SNH, k, v, tables, lengths, longest, options, with_lse=True, tile=tile)
    exact, exact_lse = decode_torch.decode(
        q_SNH.double(), k.double(), v.double(), tables, lengths, longest, options, with_lse=True
    )
    assert lse is not None
    assert exact_lse is not None
    assert out.dtype == k.dtype
    assert lse.dtype == torch.float32
    assert_near(out, exact, k.dtype)
    assert_near(lse, exact_lse, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=0, max_size=3),
    kv_heads=st.integers(1, 2),
    shared=st.integers(1, 5),
    places=st.sampled_from([16, 32, 48, 128]),
    size=st.sampled_from([64, 80, 128]),
    window=st.one_of(st.none(), st.integers(1, 100)),
    soft_cap=st.sampled_from([None, 2.0]),
    split_tokens=st.sampled_from([None, 16, 40]),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_every_sequence_sees_its_own_tokens_and_no_others(
    gpu: PagedKernels,
    device: torch.device,
    dtype: torch.dtype,
    lengths: list[int],
    kv_heads: int,
    shared: int,
    places: int,
    size: int,
    window: int | None,
    soft_cap: float | None,
    split_tokens: int | None,
    seed: int,
) -> None:
    cache = cached(
        seed, lengths, kv_heads=kv_heads, places=places, size=size, dtype=dtype, device=device
    )
    options = DecodeOptions(scale=1.5, window=window, soft_cap=soft_cap, split_tokens=split_tokens)
    check(gpu, cache, seed, shared, options, SMALL)


@pytest.mark.parametrize("sequences", BATCHES)
def test_batches_of_any_size(gpu: PagedKernels, device: torch.device, sequences: int) -> None:
    lengths = (LENGTHS * sequences)[:sequences]
    cache = cached(2, lengths, kv_heads=1, places=16, size=64, dtype=torch.bfloat16, device=device)
    check(gpu, cache, 3, 2, DecodeOptions(), SMALL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 96, 256, 512])
def test_heads_of_any_size(
    gpu: PagedKernels, device: torch.device, dtype: torch.dtype, size: int
) -> None:
    cache = cached(3, [21, 64], kv_heads=1, places=16, size=size, dtype=dtype, device=device)
    check(gpu, cache, 4, 2, DecodeOptions(split_tokens=32), SMALL)


def test_more_query_heads_than_the_least_tile_has_rows(
    gpu: PagedKernels, device: torch.device
) -> None:
    cache = cached(5, [40], kv_heads=1, places=16, size=64, dtype=torch.float32, device=device)
    check(gpu, cache, 6, 20, DecodeOptions(), SMALL)


def test_tiles_wider_than_a_block_and_narrower(gpu: PagedKernels, device: torch.device) -> None:
    for places in (16, 64):
        cache = cached(
            7, [70, 5], kv_heads=2, places=places, size=64, dtype=torch.float32, device=device
        )
        check(gpu, cache, 8, 2, DecodeOptions(), Tile(keys=32, warps=4, stages=2))


def test_a_window_begins_at_its_first_token(gpu: PagedKernels, device: torch.device) -> None:
    cache = cached(8, [40, 9], kv_heads=1, places=16, size=64, dtype=torch.float32, device=device)
    check(gpu, cache, 9, 2, DecodeOptions(window=20), SMALL)


def test_a_sequence_without_keys_gives_zeros_and_no_weight(
    gpu: PagedKernels, device: torch.device
) -> None:
    cache = cached(9, [0, 3], kv_heads=1, places=16, size=64, dtype=torch.float32, device=device)
    q_SNH = random(1, 2, 2, 64, dtype=torch.float32, device=device)
    for split in (None, 2):
        out, lse = gpu.decode(
            q_SNH,
            cache.k_BGPH,
            cache.v_BGPH,
            cache.tables_SB,
            cache.lengths_S,
            3,
            DecodeOptions(split_tokens=split),
            with_lse=True,
        )
        assert lse is not None
        assert not out[0].any()
        assert (lse[0] == -torch.inf).all()
        assert lse[1].isfinite().all()


def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch(
    gpu: PagedKernels, device: torch.device
) -> None:
    cache = cached(
        11, [50, 90, 7], kv_heads=2, places=16, size=64, dtype=torch.bfloat16, device=device
    )
    q_SNH = random(12, 3, 4, 64, dtype=torch.bfloat16, device=device)
    options = DecodeOptions(split_tokens=32)
    kv = cache.k_BGPH, cache.v_BGPH
    together, _ = gpu.decode(q_SNH, *kv, cache.tables_SB, cache.lengths_S, 90, options, tile=SMALL)
    for row in range(3):
        part = slice(row, row + 1)
        alone, _ = gpu.decode(
            q_SNH[part],
            *kv,
            cache.tables_SB[part],
            cache.lengths_S[part],
            int(cache.lengths_S[row]),
            options,
            tile=SMALL,
        )
        # Cut alike, but one part needs no merge: that is a rounding of its own.
        if cache.lengths_S[row] > 32:
            assert torch.equal(alone, together[part])
        else:
            assert_near(alone, together[part], torch.bfloat16)


@pytest.mark.parametrize("name", ["window", "soft_cap", "split_tokens"])
def test_options_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        DecodeOptions(**{name: 0})
