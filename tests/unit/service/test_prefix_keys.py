"""Names of blocks: what must be told apart is, on every machine alike."""

import pytest

from service.prefix_keys import KEY_BYTES, PrefixKeys, prefix_salt, short_key

KEYS = PrefixKeys(seed=b"model")


def test_key_stands_for_all_tokens_before_it() -> None:
    pieces = [KEYS.piece([1, 2]), KEYS.piece([3, 4])]
    root = KEYS.root(b"salt")
    assert KEYS.block(root, pieces[1]) != KEYS.block(KEYS.block(root, pieces[0]), pieces[1])
    assert len(root) == len(KEYS.block(root, pieces[0])) == KEY_BYTES


def test_tokens_are_packed_little_endian_and_must_fit() -> None:
    assert KEYS.piece([1, 2**32 - 1]) == b"\1\0\0\0\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="token ids"):
        KEYS.piece([2**32])


def test_salts_and_ranks_are_kept_apart() -> None:
    salts = [prefix_salt(first, salt) for first in (0, 1, 256) for salt in (b"", b"\0", b"a")]
    assert len({KEYS.root(salt) for salt in salts}) == len(salts)


def test_short_key_is_the_first_64_bits_little_endian() -> None:
    assert short_key(bytes([1, 0, 0, 0, 0, 0, 0, 2]) + b"the rest") == (2 << 56) + 1
