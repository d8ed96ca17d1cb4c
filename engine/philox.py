"""Counter-based random numbers: Philox4x32-10. Owns no state at all.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3. The
same key and counter give the same number on any machine, in any order, in any batch.
"""

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)

Words = NDArray[np.uint64]  # 32-bit words in 64-bit cells: products do not overflow


def philox4x32(counters: Words, keys: Words) -> Words:
    """Return four random words, [4, S], for counters of four words, [4, S], and keys [2, S]."""
    c0, c1, c2, c3 = counters
    k0, k1 = keys
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> _WORD) ^ c1 ^ k0,
            second & _LOW,
            (first >> _WORD) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack((c0, c1, c2, c3))


def uniforms(seeds: list[int], positions: list[int]) -> NDArray[np.float64]:
    """Return one number in [0, 1), of 53 bits, for each 64-bit seed and position."""
    seed, position = np.array(seeds, np.uint64), np.array(positions, np.uint64)
    zero = np.zeros_like(position)
    counters = np.stack((position & _LOW, position >> _WORD, zero, zero))
    words = philox4x32(counters, np.stack((seed & _LOW, seed >> _WORD)))
    bits = (words[0] << _WORD | words[1]) >> np.uint64(11)
    numbers: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return numbers
