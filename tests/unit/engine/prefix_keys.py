"""Keys of the prefix cache, worked out token by token."""

from collections.abc import Sequence

from service.prefix_keys import PrefixKeys

BLOCK_SIZE = 2
KEYS = PrefixKeys(seed=b"model")


def keys_of(tokens: Sequence[int], salt: bytes) -> list[bytes]:
    """The keys of the full blocks of `tokens`."""
    keys = [KEYS.root(salt)]
    for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
        piece = b"".join(t.to_bytes(4, "little") for t in tokens[start : start + BLOCK_SIZE])
        keys.append(KEYS.block(keys[-1], piece))
    return keys[1:]
