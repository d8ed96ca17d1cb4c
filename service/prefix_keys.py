"""How blocks of prompts are named, alike in the caches that have them and in routers that look.

Owns the keys alone: which blocks are where is a cache's and a router's to know. A key is a hash
over the key of the block before and the block's own token ids, so it stands for all from the first
token on; the first block's follows a root that keeps models and salts apart. Keys are compared
between machines, so every number in them is little-endian.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

KEY_BYTES = 16
SHORT_KEY_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class PrefixKeys:
    """Names the blocks of one model's prompts.

    Attributes:
        seed: The model's and its cache's; keys of different ones differ.
    """

    seed: bytes

    def root(self, salt: bytes) -> bytes:
        """Return what stands for the empty beginning of every prompt under a salt."""
        # The length keeps apart what only differs in where the seed ends and the salt begins.
        head = struct.pack("<Q", len(self.seed)) + self.seed
        return blake2b(head + salt, digest_size=KEY_BYTES, person=b"prefix root").digest()

    def piece(self, tokens: Sequence[int]) -> bytes:
        """Return a block's token ids, packed for `block`.

        Raises ValueError for an id that is not in 32 bits.
        """
        try:
            return struct.pack(f"<{len(tokens)}I", *tokens)
        except struct.error as error:
            raise ValueError(f"token ids must be 0 to 2**32 - 1: {error}") from error

    def block(self, above: bytes, piece: bytes) -> bytes:
        """Return the key of a block from that of the one before, or the root, and its tokens."""
        return blake2b(above + piece, digest_size=KEY_BYTES, person=b"prefix block").digest()


def prefix_salt(cp_first: int, cache_salt: bytes) -> bytes:
    """Return what keeps cached blocks apart: a request's own salt, and which ranks have what."""
    return cp_first.to_bytes(2, "little") + cache_salt


def short_key(key: bytes) -> int:
    """Return what a key goes by where a mistake costs no more than a miss: its first 64 bits."""
    return int.from_bytes(key[:SHORT_KEY_BYTES], "little")
