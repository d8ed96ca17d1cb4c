"""Compiled attention of decoding sequences against exact attention, and that of torch."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.decode_rows import DecodeRows
from engine.kernels import attention_cpu, decode_native
from engine.kernels.decode_native import NativeDecode
from engine.kvcache import KVCache
from engine.parallel import Layout

PART = 512  # keys, as in decode_cpu.cpp


@pytest.fixture(scope="module")
def native() -> NativeDecode:
    found = decode_native.attention()
    if found is None:
        pytest.skip("no compiled attention here")
    return found


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


class Decoding:
    """Sequences in scattered blocks of a cache that is NaN wherever they have no keys."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        size: int = 64,
        block_size: int = 16,
        seed: int = 0,
        scale: float = 1.0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        needed = [-(-length // block_size) for length in lengths]
        blocks = iter(np.random.default_rng(seed).permutation(sum(needed) + 3))
        config: Any = SimpleNamespace(
            num_kv_heads=kv_heads, num_layers=1, head_size=size, kv_planes=2, latent=None
        )
        self.cache = KVCache(
            config=config,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            num_blocks=sum(needed) + 3,
            block_size=block_size,
            layout=Layout(),
        )
        self.cache.tensor.fill_(torch.nan)
        tables = [np.array([next(blocks) for _ in range(count)]) for count in needed]
        self.rows = DecodeRows(lengths=lengths, tables=tables, cache=self.cache)
        shape = (len(lengths), heads + 3, size)  # as the query heads of wider rows
        self.q_SNH = (torch.randn(shape, generator=random) * scale / size**0.5).bfloat16()
        self.q_SNH = self.q_SNH[:, :heads]
        self.kvs = []
        for length, table in zip(lengths, tables, strict=True):
            at = np.arange(length)
            cells = self.cache.slot_mapping(table[at // block_size], at % block_size)
            kv = torch.randn(length, 2 * kv_heads, size, generator=random).bfloat16()
            self.cache.cells[0].index_put_((cells,), kv)
            self.kvs.append(kv)

    def exact(self) -> Tensor:
        found = []
        for q, kv in zip(self.q_SNH.double(), self.kvs, strict=True):
            k, v = kv.double().repeat_interleave(2 * len(q) // kv.shape[1], 1).chunk(2, dim=1)
            weights = torch.einsum("nh,lnh->nl", q, k).softmax(-1)
            found.append(torch.einsum("nl,lnh->nh", weights, v))
        return torch.stack(found)

    def ours(self, native: NativeDecode) -> Tensor:
        out = torch.full(self.q_SNH.shape, torch.nan, dtype=torch.bfloat16)
        native(self.q_SNH, self.cache.runs[0], self.rows, out)
        return out

    def torchs(self) -> Tensor:
        runs = self.cache.runs[0]
        return torch.cat(
            [
                attention_cpu._decode_torch(self.q_SNH[group.begin : group.end], runs, group)
                for group in self.rows.groups
            ]
        )


def error(found: Tensor, exact: Tensor) -> float:
    """Root of the mean square."""
    return float((found.double() - exact).square().mean().sqrt())


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1 << 30),
    lengths=st.lists(st.integers(1, 40) | st.integers(1, 1600), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    shared=st.sampled_from([1, 2, 3, 4, 5, 8]),
    size=st.sampled_from([64, 128]) | st.integers(1, 16).map(lambda n: 16 * n),
    block_size=st.sampled_from([1, 7, 16, 32, 300]),
)
def test_it_is_about_as_near_to_exact_attention_as_that_of_torch(
    native: NativeDecode,
    seed: int,
    lengths: list[int],
    kv_heads: int,
    shared: int,
    size: int,
    block_size: int,
) -> None:
    decoding = Decoding(
        sorted(lengths, reverse=True),
        heads=kv_heads * shared,
        kv_heads=kv_heads,
        size=size,
        block_size=block_size,
        seed=seed,
    )
    exact = decoding.exact()
    # Of few numbers the roundings of torch's may happen to cancel.
    allowed = 1.2 * error(decoding.torchs(), exact) + 2**-12
    assert error(decoding.ours(native), exact) <= allowed


@pytest.mark.parametrize("shared", [17, 32])
def test_many_query_heads_may_share_a_kv_head(native: NativeDecode, shared: int) -> None:
    decoding = Decoding([600, 40], heads=shared, kv_heads=1)
    torch.testing.assert_close(decoding.ours(native).double(), decoding.exact(), rtol=0, atol=2**-7)


def test_only_key_gives_its_value(native: NativeDecode) -> None:
    decoding = Decoding([1, 1], heads=6, kv_heads=3)
    values = torch.stack([kv[0, 3:] for kv in decoding.kvs])
    assert decoding.ours(native).equal(values.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("length", [1, 15, 16, 17, PART - 1, PART, PART + 1, 3 * PART + 31])
def test_what_is_left_in_blocks_from_others_is_not_read(native: NativeDecode, length: int) -> None:
    assert Decoding([length]).ours(native).isfinite().all()


@pytest.mark.parametrize("at", [0, 100, PART - 1, PART, 1199])
def test_nan_that_is_seen_is_not_lost(native: NativeDecode, at: int) -> None:
    decoding = Decoding([1200, 1200])
    block, place = decoding.rows.tables[1][at // 16], at % 16
    decoding.cache.tensor[0, 0, block, 1, place, 5] = torch.nan
    out = decoding.ours(native)
    assert out[0].isfinite().all()
    assert out[1, :2].isfinite().all()
    assert out[1, 2:].isnan().all()


@pytest.mark.parametrize("scale", [1e3, 1e12, 1e30])
def test_great_scores_do_not_overflow(native: NativeDecode, scale: float) -> None:
    decoding = Decoding([1200, 90], scale=scale)
    torch.testing.assert_close(decoding.ours(native).double(), decoding.exact(), rtol=0, atol=2**-6)


def test_threads_and_company_change_no_bit(native: NativeDecode, two_threads: None) -> None:
    lengths = [3000, 2000, 1024, 513, 512, 511, 40, 1]
    decoding = Decoding(lengths, heads=8, kv_heads=2, size=128)
    both = decoding.ours(native)
    torch.set_num_threads(1)
    assert decoding.ours(native).equal(both)
    for i, length in enumerate(lengths):
        rows = DecodeRows(lengths=[length], tables=[decoding.rows.tables[i]], cache=decoding.cache)
        alone = torch.empty(1, 8, 128, dtype=torch.bfloat16)
        native(decoding.q_SNH[i : i + 1], decoding.cache.runs[0], rows, alone)
        assert alone[0].equal(both[i])


def test_torch_attends_where_there_is_no_compiled_code(
    native: NativeDecode, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = Decoding([600, 40])
    out = torch.empty(2, 4, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(decode_native, "attention", lambda: None)
    attention_cpu._decode(decoding.q_SNH, decoding.cache.runs[0], decoding.rows, out, False)
    assert out.equal(decoding.torchs())
    assert not out.equal(decoding.ours(native))
