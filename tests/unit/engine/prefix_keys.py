"""Keys of the prefix cache, worked out token by token."""

from collections.abc import Sequence

from engine.prefix_cache import block_key, root_key

BLOCK_SIZE = 2
FINGERPRINT = "model"


def keys_of(tokens: Sequence[int], salt: bytes) -> list[bytes]:
    """The keys of the full blocks of `tokens`."""
    keys = [root_key(FINGERPRINT.encode(), salt)]
    for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
        piece = b"".join(t.to_bytes(4, "little") for t in tokens[start : start + BLOCK_SIZE])
        keys.append(block_key(keys[-1], piece))
    return keys[1:]
