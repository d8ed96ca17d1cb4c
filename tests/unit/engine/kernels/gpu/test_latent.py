"""Attention over latents against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.gpu import latent_torch
from engine.kernels.gpu.tune import Tile
from engine.kernels.table import PagedKernels
from tests.unit.engine.kernels.gpu.tensors import (
    BATCHES,
    DTYPES,
    LENGTHS,
    apart,
    assert_near,
    cached,
    random,
)

SMALL = Tile(rows=16, keys=16, warps=4, stages=2)


def check(
    gpu: PagedKernels,
    q_TNX: Tensor,
    cells_BPX: Tensor,
    latent: int,
    tables_TB: Tensor,
    lengths_T: Tensor,
    split_tokens: int | None = None,
    tile: Tile | None = SMALL,
) -> None:
    longest = int(lengths_T.max()) if len(lengths_T) else 0
    asked = latent, tables_TB, lengths_T, longest
    found, lse = gpu.latent(
        q_TNX, cells_BPX, *asked, scale=0.3, split_tokens=split_tokens, with_lse=True, tile=tile
    )
    exact, exact_lse = latent_torch.attend(
        q_TNX.double(), cells_BPX.double(), *asked, scale=0.3, with_lse=True
    )
    assert lse is not None
    assert exact_lse is not None
    assert found.dtype == q_TNX.dtype
    assert_near(found, exact, q_TNX.dtype)
    assert_near(lse, exact_lse, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=0, max_size=3),
    heads=st.sampled_from([1, 5, 16, 20]),
    places=st.sampled_from([16, 48]),
    sizes=st.sampled_from([(32, 16), (40, 8), (64, 64)]),
    split_tokens=st.sampled_from([None, 16, 40]),
    seed=st.integers(0, 99),
)
@settings(max_examples=10, deadline=None)
def test_every_query_sees_its_own_sequences_cells(
    gpu: PagedKernels,
    device: torch.device,
    dtype: torch.dtype,
    lengths: list[int],
    heads: int,
    places: int,
    sizes: tuple[int, int],
    split_tokens: int | None,
    seed: int,
) -> None:
    size = sum(sizes)
    cache = cached(seed, lengths, kv_heads=1, places=places, size=size, dtype=dtype, device=device)
    q_TNX = apart(random(seed, len(lengths), heads, size, dtype=dtype, device=device))
    cells_BPX = cache.k_BGPH[:, 0]
    check(gpu, q_TNX, cells_BPX, sizes[0], cache.tables_SB, cache.lengths_S, split_tokens)


@pytest.mark.parametrize("sequences", BATCHES)
def test_batches_of_any_size(gpu: PagedKernels, device: torch.device, sequences: int) -> None:
    lengths = (LENGTHS * sequences)[:sequences]
    cache = cached(2, lengths, kv_heads=1, places=16, size=48, dtype=torch.bfloat16, device=device)
    q_TNX = random(3, sequences, 5, 48, dtype=torch.bfloat16, device=device)
    check(gpu, q_TNX, cache.k_BGPH[:, 0], 32, cache.tables_SB, cache.lengths_S)


def test_sizes_of_deepseek(gpu: PagedKernels, device: torch.device) -> None:
    cache = cached(1, [37, 5], kv_heads=1, places=64, size=576, dtype=torch.bfloat16, device=device)
    q_TNX = random(2, 2, 16, 576, dtype=torch.bfloat16, device=device) / 24
    check(gpu, q_TNX, cache.k_BGPH[:, 0], 512, cache.tables_SB, cache.lengths_S, tile=None)


def test_tokens_of_a_prompt_see_those_before_them(gpu: PagedKernels, device: torch.device) -> None:
    cache = cached(3, [50], kv_heads=1, places=16, size=48, dtype=torch.float32, device=device)
    q_TNX = random(4, 20, 6, 48, dtype=torch.float32, device=device)
    lengths_T = torch.arange(31, 51, device=device, dtype=torch.int32)
    tables_TB = cache.tables_SB.expand(20, -1)
    check(gpu, q_TNX, cache.k_BGPH[:, 0], 32, tables_TB, lengths_T)


def test_a_row_does_not_depend_on_its_batch_where_the_split_is_set(
    gpu: PagedKernels, device: torch.device
) -> None:
    cache = cached(
        5, [70, 33, 8], kv_heads=1, places=16, size=48, dtype=torch.bfloat16, device=device
    )
    q_TNX = random(6, 3, 8, 48, dtype=torch.bfloat16, device=device)
    cells_BPX, tables, lengths = cache.k_BGPH[:, 0], cache.tables_SB, cache.lengths_S
    together, _ = gpu.latent(q_TNX, cells_BPX, 32, tables, lengths, 70, split_tokens=32, tile=SMALL)
    for row, length in enumerate((70, 33, 8)):
        one = slice(row, row + 1)
        alone, _ = gpu.latent(
            q_TNX[one],
            cells_BPX,
            32,
            tables[one],
            lengths[one],
            length,
            split_tokens=32,
            tile=SMALL,
        )
        torch.testing.assert_close(alone, together[one], atol=0.0, rtol=2**-7)


def test_queries_of_another_size_are_refused(gpu: PagedKernels, device: torch.device) -> None:
    cells = torch.ones(2, 16, 48, device=device)
    table = torch.zeros(1, 2, dtype=torch.int32, device=device)
    length = torch.ones(1, dtype=torch.int32, device=device)
    for size, latent in ((40, 32), (48, 48)):
        with pytest.raises(ValueError, match="both must have the latent"):
            gpu.latent(torch.ones(1, 4, size, device=device), cells, latent, table, length, 1)


def test_there_is_a_tile_for_any_number_of_heads(gpu: PagedKernels) -> None:
    from engine.kernels.gpu import latent

    for heads, rows in ((1, 16), (16, 16), (32, 32), (128, 64)):
        q = torch.empty(1, heads, 576, dtype=torch.bfloat16)
        assert max(tile.rows for tile in latent.choices(q, 512, 9000).tiles) == rows
