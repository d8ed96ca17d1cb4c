"""Passes before the first request: within the cache, whatever its size."""

from hypothesis import given
from hypothesis import strategies as st

from engine.warm_up import warm_up_passes


@given(
    blocks=st.integers(1, 3000),
    block_tokens=st.sampled_from([1, 8, 32, 48]),
    ranks=st.integers(1, 4),
    all_forms=st.booleans(),
)
def test_passes_fit_the_cache(blocks: int, block_tokens: int, ranks: int, all_forms: bool) -> None:
    most = blocks * block_tokens
    ends = set()
    for chunks in warm_up_passes(most, block_tokens, ranks, all_forms=all_forms):
        for chunk in chunks:
            assert 0 <= chunk.start < chunk.end <= most
            assert len(chunk.block_table) == -(-chunk.end // block_tokens)
            ends.add(chunk.end)
    assert min(256 * ranks, most) in ends
    assert not all_forms or most in ends


def test_typical_sizes_are_few() -> None:
    """They are all that a CPU's instances run at start."""
    assert len(list(warm_up_passes(1 << 20, 32, 1, all_forms=False))) == 3
