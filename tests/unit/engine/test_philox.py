"""Philox4x32-10 against the authors' published vectors (Random123, kat_vectors)."""

import numpy as np
import pytest

from engine.philox import philox4x32, uniforms

VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox4x32(np.array([counter], np.uint64).T, np.array([key], np.uint64).T)
    assert words[:, 0].tolist() == expected


def test_a_number_depends_on_its_own_seed_and_position_alone() -> None:
    seeds, positions = [3, 2**64 - 1, 3, 0], [0, 7, 2**33, 5]
    together = uniforms(seeds, positions)
    alone = [uniforms([s], [p])[0] for s, p in zip(seeds, positions, strict=True)]
    assert together.tolist() == alone
    assert len(set(alone)) == 4


def test_numbers_are_even_and_below_one() -> None:
    numbers = uniforms([1] * 20_000, list(range(20_000)))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-square, 19 degrees: p about 1e-4
