"""Compiled attention against exact attention, and against that of torch's operators."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.batch import Chunk, make_batch
from engine.kernels import attention_cpu, attention_native
from engine.kernels.attention_native import NativeAttention
from engine.kvcache import KVCache
from engine.parallel import Layout
from engine.ring import block
from native import load_if_possible
from tests.unit.engine.ring.exact import attention, inputs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def native() -> NativeAttention:
    found = attention_native.attention()
    if found is None:
        pytest.skip("no compiled attention here")
    return found


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def error(found: Tensor, exact: Tensor) -> float:
    """Root of the mean square."""
    return float((found.double() - exact).square().mean().sqrt())


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1 << 30),
    tokens=st.integers(1, 150),
    keys=st.integers(1, 700),
    window=st.none() | st.integers(1, 400),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 8),
    head_size=st.sampled_from([16, 64, 80, 96, 112, 128, 256]),
)
def test_partial_is_as_near_to_exact_attention_as_that_of_torch(
    native: NativeAttention,
    seed: int,
    tokens: int,
    keys: int,
    window: int | None,
    kv_heads: int,
    shared: int,
    head_size: int,
) -> None:
    random = np.random.default_rng(seed)
    at_T = np.sort(random.choice(900, tokens, replace=False))
    at_L = np.sort(random.choice(900, keys, replace=False))
    q, kv = (
        x.bfloat16() for x in inputs(seed, tokens, keys, kv_heads * shared, kv_heads, head_size)
    )
    out, lse = attention(q, torch.from_numpy(at_T), kv, torch.from_numpy(at_L), window)
    sees = lse.isfinite()
    assume(sees.any())
    ours = block.attend(q, at_T, kv, at_L, window)
    plain = block._attend_torch(q, at_T, kv, at_L, window)
    # Of few rows the roundings of torch's may happen to cancel.
    allowed = error(plain.out_TNH, out) + (2**-10 if tokens < 50 else 0)
    assert error(ours.out_TNH, out) <= allowed
    torch.testing.assert_close(ours.lse_TN[sees].double(), lse[sees], rtol=1e-6, atol=1e-5)
    assert ours.out_TNH[~sees].eq(0).all()
    assert ours.lse_TN[~sees].eq(-torch.inf).all()


@pytest.mark.parametrize("window", [None, 20])
def test_query_that_sees_one_key_has_its_value(native: NativeAttention, window: int | None) -> None:
    q, kv = (x.bfloat16() for x in inputs(1, 5, 5, 4, 2, 64))
    at = np.arange(5) * 20
    partial = block.attend(q, at, kv, at, window)
    rows = slice(1) if window is None else slice(5)
    assert partial.out_TNH[rows].equal(kv[rows, 2:].float().repeat_interleave(2, dim=1))


def test_keys_that_nobody_sees_are_not_read(native: NativeAttention) -> None:
    q, kv = (x.bfloat16() for x in inputs(6, 8, 60, 4, 2, 64))
    kv[48:] = torch.nan  # after the last query
    kv[:31] = torch.nan  # before the first one's window
    partial = block.attend(q, np.arange(40, 48), kv, np.arange(60), 10)
    assert partial.out_TNH.isfinite().all()


def test_nan_that_is_seen_is_not_lost(native: NativeAttention) -> None:
    q, kv = (x.bfloat16() for x in inputs(6, 100, 100, 4, 2, 64))
    kv[70, 1, 3] = torch.nan
    partial = block.attend(q, np.arange(100), kv, np.arange(100))
    assert partial.out_TNH[:64].isfinite().all()
    assert partial.out_TNH[70:, 2:].isnan().all()


@pytest.mark.parametrize("scale", [1e3, 1e12, 1e30])
def test_great_scores_do_not_overflow(native: NativeAttention, scale: float) -> None:
    q, kv = (x.bfloat16() for x in inputs(8, 40, 90, 2, 1, 64))
    at_T, at_L = np.arange(50, 90), np.arange(90)
    great = (q * scale).bfloat16()
    out, lse = attention(great, torch.from_numpy(at_T), kv, torch.from_numpy(at_L), None)
    partial = block.attend(great, at_T, kv, at_L)
    torch.testing.assert_close(partial.lse_TN.double(), lse, rtol=1e-5, atol=0)
    torch.testing.assert_close(partial.out_TNH.double(), out, rtol=0, atol=2**-7)


def test_threads_and_rounds_change_no_bit(
    native: NativeAttention, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, kv = (x.bfloat16() for x in inputs(3, 400, 600, 6, 3, 64))
    at_T, at_L = np.arange(200, 600), np.arange(600)
    both = block.attend(q, at_T, kv, at_L)
    monkeypatch.setattr(attention_native, "_PACKED_BYTES", 1)  # one head after another
    rounds = block.attend(q, at_T, kv, at_L)
    torch.set_num_threads(1)
    alone = block.attend(q, at_T, kv, at_L)
    assert both.memory.equal(rounds.memory)
    assert both.memory.equal(alone.memory)


def test_rows_do_not_depend_on_their_company(native: NativeAttention) -> None:
    q, kv = (x.bfloat16() for x in inputs(4, 100, 300, 6, 2, 64))
    at_T, at_L = np.arange(200, 300), np.arange(300)
    whole = block.attend(q, at_T, kv, at_L)
    for begin, end in ((0, 37), (37, 38), (38, 100)):
        part = block.attend(q[begin:end], at_T[begin:end], kv, at_L)
        assert part.out_TNH.equal(whole.out_TNH[begin:end])
        assert part.lse_TN.equal(whole.lse_TN[begin:end])


class Paged:
    """A cache of scattered blocks, full of noise, with chunks over it and their exact attention."""

    def __init__(
        self, chunks: list[tuple[int, int]], heads: int, kv_heads: int, size: int, block_size: int
    ) -> None:
        random = np.random.default_rng(len(chunks))
        tables = [-(-(start + tokens) // block_size) for start, tokens in chunks]
        blocks = iter(random.permutation(sum(tables)).tolist())
        config: Any = SimpleNamespace(
            num_kv_heads=kv_heads, num_layers=1, head_size=size, kv_planes=2, latent=None
        )
        self.cache = KVCache(
            config=config,
            dtype=torch.bfloat16,
            device=CPU,
            num_blocks=sum(tables),
            block_size=block_size,
            layout=Layout(),
        )
        self.cache.tensor.fill_(torch.nan)
        self.heads = heads
        self.exact, qkvs, made = [], [], []
        for number, ((start, tokens), count) in enumerate(zip(chunks, tables, strict=True)):
            table = [next(blocks) for _ in range(count)]
            end = start + tokens
            q, kv = (x.bfloat16() for x in inputs(number, end, end, heads, kv_heads, size))
            at = np.arange(end)
            places = np.asarray(table)[at // block_size], at % block_size
            self.cache.cells[0].index_put_((self.cache.slot_mapping(*places),), kv)
            out, _ = attention(q[start:], torch.arange(start, end), kv, torch.arange(end), None)
            self.exact.append(out.flatten(1))
            qkvs.append(torch.cat((q, kv), dim=1)[start:])
            made.append(Chunk(token_ids=[0] * tokens, start=start, block_table=table))
        self.batch = make_batch(made, self.cache, vocab_size=1)
        self.qkv_TNH = torch.empty(sum(map(len, qkvs)), *qkvs[0].shape[1:], dtype=torch.bfloat16)
        for rows, qkv in zip(self.batch.rows_of, qkvs, strict=True):
            self.qkv_TNH[rows] = qkv

    def errors(self) -> list[float]:
        out = attention_cpu.attend(self.qkv_TNH, self.cache.runs[0], self.batch, self.heads)
        return [
            error(out[rows], exact)
            for rows, exact in zip(self.batch.rows_of, self.exact, strict=True)
        ]


CHUNKS = [
    [(0, 2)],
    [(0, 129)],
    [(31, 5), (0, 70)],
    [(32, 64), (200, 1), (100, 1), (7, 300)],
    [(513, 97), (0, 33)],
]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (3, 3, 128), (8, 1, 80)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_paged_prefill_is_at_least_as_exact_as_that_of_torch(
    native: NativeAttention,
    chunks: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    size: int,
    block_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paged = Paged(chunks, heads, kv_heads, size, block_size)
    ours = paged.errors()
    monkeypatch.setattr(attention_native, "attention", lambda: None)
    plain = paged.errors()
    for mine, theirs in zip(ours, plain, strict=True):
        assert 0 < mine <= theirs


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(3, 4, 64),
        torch.zeros(3, 4, 24, dtype=torch.bfloat16),
        torch.zeros(3, 4, 272, dtype=torch.bfloat16),
        torch.zeros(4, 3, 64, dtype=torch.bfloat16).transpose(0, 1),
        torch.zeros(3, 4, 128, dtype=torch.bfloat16)[..., ::2],
    ],
)
def test_other_tensors_are_left_to_torch(bad: Tensor) -> None:
    good = torch.zeros(3, 4, 64, dtype=torch.bfloat16)
    assert attention_native.fits(good, good)
    assert not attention_native.fits(bad, good)
    assert not attention_native.fits(good, bad)


@pytest.mark.parametrize("lack", ["switch", "compiler", "source"])
def test_without_compiled_code_torch_computes_and_it_is_said_once(
    lack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if lack == "switch":
        monkeypatch.setenv("TWINPOOL_NATIVE", "0")
    elif lack == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setattr(attention_native, "_SOURCE", tmp_path / "missing.cpp")
    lookup = attention_native.attention
    lookup.cache_clear()
    load_if_possible.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            paged = Paged([(20, 40), (0, 9)], 4, 2, 64, 16)
            assert max(paged.errors()) < 2**-7
            q, kv = (x.bfloat16() for x in inputs(7, 40, 40, 4, 2, 64))
            at = np.arange(40)
            assert block.attend(q, at, kv, at).out_TNH.isfinite().all()
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1
        assert said[0].startswith("attention is computed with torch's operators: ")
    finally:
        lookup.cache_clear()
        load_if_possible.cache_clear()
