"""Made-up inputs whose unused memory is NaN, and comparison with float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
# Rows of a step: none that fill a tile, some that do, and one more.
BATCHES = (1, 2, 15, 16, 17, 63, 64, 65, 255, 256)
# Keys of sequences: none, a block's last, and one more.
LENGTHS = (0, 1, 15, 16, 17, 33)
# Of attention: scores and sums are fp32, but weights are rounded to the dtype before the product.
_RTOL = {torch.float32: 2e-5, torch.bfloat16: 2**-7}
_ATOL = {torch.float32: 2e-5, torch.bfloat16: 2**-6}


def random(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).to(device)


def apart(tensor: Tensor) -> Tensor:
    """Return the same values as a part of a tensor whose other elements are NaN."""
    if not tensor.dim():
        return tensor
    shape = [size + 3 for size in tensor.shape]
    wide = torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)
    part = wide[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return part.copy_(tensor)


def assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert not found.isnan().any()
    torch.testing.assert_close(found.double(), exact.double(), rtol=_RTOL[dtype], atol=_ATOL[dtype])


@dataclass(frozen=True)
class Cached:
    """One layer's cache with some sequences in it; all else is NaN, and tables end in nonsense."""

    k_BGPH: Tensor
    v_BGPH: Tensor
    tables_SB: Tensor
    lengths_S: Tensor


def cached(
    seed: int,
    lengths: Sequence[int],
    *,
    kv_heads: int,
    places: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Cached:
    """Put sequences of so many tokens into blocks, in no order."""
    counts = [-(-length // places) for length in lengths]
    num_blocks = sum(counts) + 2
    # As the engine's: a layer's keys and values are two parts of one tensor.
    both = torch.full((2, num_blocks, kv_heads, places, size), torch.nan, dtype=dtype)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = torch.full((len(lengths), max(counts, default=0) + 1), 10**8, dtype=torch.int32)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(blocks, dtype=torch.int32)
        for first, block in zip(range(0, length, places), blocks, strict=True):
            held = min(places, length - first)
            tokens = random(
                seed * 1000 + block,
                2,
                kv_heads,
                held,
                size,
                dtype=dtype,
                device=torch.device("cpu"),
            )
            both[:, block, :, :held] = tokens
    k_BGPH, v_BGPH = both.to(device).unbind()
    lengths_S = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Cached(k_BGPH, v_BGPH, tables.to(device), lengths_S)
