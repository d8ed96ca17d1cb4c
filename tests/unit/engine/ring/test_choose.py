"""Which variant a pass should use."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ring.choose import (
    AttentionShape,
    Load,
    Speeds,
    Variant,
    choose,
    pass_kv_bytes,
    pass_q_bytes,
)

LLAMA = AttentionShape(heads=32, kv_heads=8, head_size=128, element_bytes=2)


def test_bytes_are_those_of_every_hop() -> None:
    load = Load(new=100, cached=900)
    assert pass_kv_bytes(load, LLAMA, ranks=4) == 3 * 1000 * 2 * 8 * 128 * 2
    assert pass_q_bytes(load, LLAMA, ranks=4) == 3 * 100 * 32 * (128 * 2 + 129 * 4)


def test_a_cell_that_is_key_and_value_travels_once() -> None:
    latent = AttentionShape(heads=16, kv_heads=1, head_size=576, element_bytes=2, planes=1)
    assert pass_kv_bytes(Load(new=100, cached=900), latent, ranks=4) == 3 * 1000 * 576 * 2


def test_window_leaves_out_what_no_new_token_sees() -> None:
    windowed = AttentionShape(heads=32, kv_heads=8, head_size=128, element_bytes=2, window=65)
    assert pass_kv_bytes(Load(100, 900), windowed, 2) == pass_kv_bytes(Load(100, 64), LLAMA, 2)
    assert pass_kv_bytes(Load(100, 30), windowed, 2) == pass_kv_bytes(Load(100, 30), LLAMA, 2)


@pytest.mark.parametrize(
    ("new", "cached", "variant"),
    [
        (1000, 0, Variant.PASS_KV),
        (1000, 5000, Variant.PASS_KV),
        (1000, 5100, Variant.PASS_Q),
        (1, 1000, Variant.PASS_Q),
    ],
)
def test_fewer_bytes_win(new: int, cached: int, variant: Variant) -> None:
    # Equal at (new + cached) * 2 * 8 * 256 = new * 32 * (256 + 516): 6.03 tokens for a new one.
    assert choose([Load(new, cached)], LLAMA, ranks=4) is variant


def test_batch_is_chosen_for_as_a_whole() -> None:
    fresh, cached = Load(1000, 0), Load(100, 2000)
    assert choose([cached], LLAMA, 2) is Variant.PASS_Q
    assert choose([fresh, cached], LLAMA, 2) is Variant.PASS_KV


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 100_000), st.integers(1, 64))
def test_number_of_ranks_does_not_change_which_sends_less(new: int, cached: int, n: int) -> None:
    load = Load(new, cached)
    two = pass_kv_bytes(load, LLAMA, 2) - pass_q_bytes(load, LLAMA, 2)
    assert pass_kv_bytes(load, LLAMA, n) - pass_q_bytes(load, LLAMA, n) == (n - 1) * two


def test_hidden_keys_win_over_fewer_bytes() -> None:
    """From N * C * kv_heads * e / (2 * heads * BW) new tokens on, compute hides pass-KV's hops."""
    speeds = Speeds(flops_per_s=1e14, bytes_per_s=25e9)
    ranks = 4
    enough = ranks * 1e14 * 8 * 2 / (2 * 32 * 25e9)
    hidden = Load(new=int(enough) + 1, cached=1_000_000)
    assert choose([hidden], LLAMA, ranks) is Variant.PASS_Q
    assert choose([hidden], LLAMA, ranks, speeds) is Variant.PASS_KV
    assert choose([Load(int(enough) // 4, 1_000_000)], LLAMA, ranks, speeds) is Variant.PASS_Q


def test_one_rank_sends_nothing() -> None:
    assert pass_kv_bytes(Load(10, 10), LLAMA, 1) == pass_q_bytes(Load(10, 10), LLAMA, 1) == 0
