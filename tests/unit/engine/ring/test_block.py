"""Attention of a piece of queries over pieces of keys."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ring import block
from engine.ring.shards import positions
from tests.unit.engine.ring.exact import attention, inputs

# (begin, length) of the gaps between pieces and of the pieces.
PIECES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), max_size=4)


def made(gaps_and_lengths: list[tuple[int, int]]) -> tuple[range, ...]:
    pieces, end = [], -1
    for gap, length in gaps_and_lengths:
        pieces.append(range(end + gap, end + gap + length))
        end = pieces[-1].stop
    return tuple(pieces)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    start=st.integers(0, 120),
    tokens=st.integers(0, 40),
    keys=PIECES.map(made),
    window=st.none() | st.integers(1, 130),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_piece_agrees_with_exact_attention_at_its_positions(
    seed: int,
    start: int,
    tokens: int,
    keys: tuple[range, ...],
    window: int | None,
    kv_heads: int,
) -> None:
    at_keys = torch.from_numpy(positions(keys))
    q, kv = inputs(seed, tokens, len(at_keys), 4, kv_heads, 8)
    queries = range(start, start + tokens)
    partial = block.attend(q, np.asarray(queries), kv, positions(keys), window)
    out, lse = attention(q, torch.tensor(queries, dtype=torch.int64), kv, at_keys, window)
    torch.testing.assert_close(partial.out_TNH.double(), out, rtol=0, atol=1e-5)
    torch.testing.assert_close(partial.lse_TN.double(), lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("window", [None, 50, 300])
def test_more_queries_than_a_slice_has_agree(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "_SLICE_SCORES", 4 * 17 * 400)  # 17 queries of 4 heads
    q, kv = inputs(5, 211, 400, 4, 2, 16)
    keys = (range(40, 140), range(200, 500))
    partial = block.attend(q, np.asarray(range(180, 391)), kv, positions(keys), window)
    at_keys = torch.from_numpy(positions(keys))
    out, lse = attention(q, torch.arange(180, 391), kv, at_keys, window)
    torch.testing.assert_close(partial.out_TNH.double(), out, rtol=0, atol=1e-5)
    torch.testing.assert_close(partial.lse_TN.double(), lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("window", [None, 10])
def test_keys_that_no_query_sees_are_not_read(window: int | None) -> None:
    q, kv = inputs(6, 8, 60, 4, 2, 8)
    kv[48:] = torch.nan  # after the last query
    if window is not None:
        kv[: 40 - window + 1] = torch.nan  # before the first query's window
    partial = block.attend(q, np.asarray(range(40, 48)), kv, np.arange(60), window)
    assert partial.out_TNH.isfinite().all()


def test_bfloat16_agrees_within_its_rounding() -> None:
    q, kv = (x.bfloat16() for x in inputs(7, 40, 300, 4, 2, 64))
    partial = block.attend(q, np.asarray(range(260, 300)), kv, np.arange(300))
    out, lse = attention(q, torch.arange(260, 300), kv, torch.arange(300), None)
    assert partial.out_TNH.dtype == partial.lse_TN.dtype == torch.float32
    torch.testing.assert_close(partial.out_TNH.double(), out, rtol=0, atol=2**-7)
    torch.testing.assert_close(partial.lse_TN.double(), lse, rtol=0, atol=2**-7)


def test_great_scores_do_not_overflow() -> None:
    q, kv = inputs(8, 4, 20, 2, 1, 8)
    partial = block.attend(q * 1000, np.asarray(range(10, 14)), kv, np.arange(20))
    out, _ = attention(q * 1000, torch.arange(10, 14), kv, torch.arange(20), None)
    assert partial.lse_TN.abs().max() > 100  # exp of it is beyond fp32
    torch.testing.assert_close(partial.out_TNH.double(), out, rtol=0, atol=1e-3)


def test_queries_before_all_keys_see_nothing() -> None:
    q, kv = inputs(9, 4, 20, 2, 1, 8)
    partial = block.attend(q, np.asarray(range(4)), kv, np.arange(4, 24))
    assert partial.lse_TN.eq(-torch.inf).all()
    assert partial.out_TNH.eq(0).all()
