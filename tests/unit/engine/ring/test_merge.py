"""Merging attention over parts of the keys."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ring.merge import Partial
from tests.unit.engine.ring.exact import attention, inputs

TOKENS, HEADS, HEAD_SIZE = 6, 4, 8


def partial_of(q: torch.Tensor, at: torch.Tensor, kv: torch.Tensor, keys: torch.Tensor) -> Partial:
    """Attention over some keys as a partial, rounded to fp32."""
    partial = Partial.undefined(q)
    out, lse = attention(q, at, kv[keys], keys, None)
    partial.out_TNH.copy_(out)
    partial.lse_TN.copy_(lse)
    return partial


@settings(deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    keys=st.integers(0, 40),
    first=st.integers(-20, 40),
    parts=st.integers(1, 6),
    scale=st.sampled_from([0.0, 1.0, 10.0]),
)
def test_any_split_in_any_order_is_attention_over_all(
    seed: int, keys: int, first: int, parts: int, scale: float
) -> None:
    """Positions before 0 see no key at all; a part may be empty, or masked for some rows."""
    q, kv = inputs(seed, TOKENS, keys, HEADS, 2, HEAD_SIZE)
    q *= scale
    at = torch.arange(first, first + TOKENS)
    chance = random.Random(seed)
    part_of = torch.tensor([chance.randrange(parts) for _ in range(keys)], dtype=torch.int64)
    merged = Partial.nothing(q)
    for part in chance.sample(range(parts), parts):
        merged.merge(partial_of(q, at, kv, (part_of == part).nonzero()[:, 0]))
    out, lse = attention(q, at, kv, torch.arange(keys), None)
    torch.testing.assert_close(merged.out_TNH.double(), out, rtol=0, atol=5e-5)
    torch.testing.assert_close(merged.lse_TN.double(), lse, rtol=1e-6, atol=1e-5)


def test_merging_nothing_changes_no_bit() -> None:
    q, kv = inputs(1, TOKENS, 9, HEADS, 2, HEAD_SIZE)
    partial = partial_of(q, torch.arange(-2, 4), kv, torch.arange(9))
    before = partial.memory.clone()
    partial.merge(Partial.nothing(q))
    assert torch.equal(partial.memory, before)


def test_nothing_takes_over_what_it_is_given() -> None:
    q, kv = inputs(2, TOKENS, 9, HEADS, 2, HEAD_SIZE)
    partial = partial_of(q, torch.arange(-2, 4), kv, torch.arange(9))
    merged = Partial.nothing(q)
    merged.merge(partial)
    assert torch.equal(merged.memory, partial.memory)


def test_scores_too_great_for_exp_are_merged() -> None:
    great, greater = (Partial.nothing(torch.empty(1, 1, 2)) for _ in range(2))
    great.lse_TN.fill_(3000.0)
    great.out_TNH.fill_(1.0)
    greater.lse_TN.fill_(3000.0)
    greater.out_TNH.fill_(3.0)
    great.merge(greater)
    torch.testing.assert_close(great.out_TNH, torch.full((1, 1, 2), 2.0))
    torch.testing.assert_close(
        great.lse_TN, torch.tensor([[3000.0]]).add(torch.log(torch.tensor(2.0)))
    )


def test_rows_are_merged_for_themselves() -> None:
    q, kv = inputs(3, TOKENS, 9, HEADS, 2, HEAD_SIZE)
    at, keys = torch.arange(3, 9), torch.arange(9)
    merged = Partial.nothing(q)
    merged.rows(2, 4).merge(partial_of(q[2:4], at[2:4], kv, keys))
    whole = partial_of(q, at, kv, keys)
    assert torch.equal(merged.out_TNH[2:4], whole.out_TNH[2:4])
    assert merged.lse_TN[[0, 1, 4, 5]].eq(-torch.inf).all()
