"""Which beginnings of prompts an instance has the KV of already, and what that spares a transfer.

Owns the way from a sequence's tokens to the prefix cache, and from what is found there to `kept`.
Who holds a block is the pool's to know, and when a sequence's KV is whole its caller's. Not
thread-safe: whoever calls the pool calls this.
"""

from array import array
from collections.abc import Sequence

from engine.blocks import BlockPool
from engine.prefix_cache import Acquired, PrefixCache
from kvtransfer import Kept
from service.prefix_keys import prefix_salt


class Prefixes:
    """Takes blocks for sequences, and remembers what is in them.

    Args:
        pool: Gives the blocks.
        cache: Attached to the pool; None where nothing is to be remembered.
        layers: Layers of the model, whose cache is one group.
        prompts_only: Whether nothing is kept of what follows a prompt: prefill would compute that
            in another way than steps have, and whether it is known would show in the tokens.
        dp_rank: Whose blocks these are. Routers know a block of each dp rank by another name, as
            they do those of prompts that begin at another cp rank of prefill.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        cache: PrefixCache | None = None,
        layers: int,
        dp_rank: int = 0,
        prompts_only: bool = False,
    ) -> None:
        self.pool = pool
        self._dp_rank = dp_rank
        self._cache = cache
        self._layers = layers
        self._prompts_only = prompts_only

    def take(
        self,
        prompt: Sequence[int],
        cache_salt: bytes,
        num_blocks: int,
        *,
        needs_logits: bool = False,
    ) -> Acquired:
        """Take a sequence's blocks, those of the prompt's longest known beginning among them.

        `prompt` is empty where its tokens are not known; where it `needs_logits` its last token is
        left to be computed. Raises OutOfBlocks; nothing is taken then.
        """
        if self._cache is None or not prompt:
            return Acquired(blocks=self.pool.reserve(num_blocks), shared=0, tokens=0)
        # The cache leaves the last token out, for its logits. Where prefill has these, the prompt's
        # last block may be known here as well: the first one that is written is the next.
        tokens = array("I", prompt)
        if not needs_logits:
            tokens.append(0)
        return self._cache.acquire(tokens, prefix_salt(self._dp_rank, cache_salt), num_blocks)

    def take_again(
        self, prompt: Sequence[int], cache_salt: bytes, held: Sequence[int], shared: int
    ) -> Acquired | None:
        """Exchange a sequence's blocks where more of them may be `shared` by now; None: they stay.

        Nothing may have been written to them, and the prompt's last token is left to be computed.
        """
        if self._cache is None:
            return None
        tokens, salt = array("I", prompt), prefix_salt(self._dp_rank, cache_salt)
        if len(self._cache.match(tokens, salt)) <= shared:
            return None
        # What is given back is enough for what is taken: nobody else comes in between.
        self.pool.release(held)
        return self._cache.acquire(tokens, salt, len(held))

    def remember(
        self, prompt: Sequence[int], output: Sequence[int], cache_salt: bytes, blocks: Sequence[int]
    ) -> None:
        """Keep full blocks with the KV of a prompt and what follows it.

        They are never written again. Nothing is kept of a prompt whose tokens are not known.
        """
        if self._cache is not None and prompt:
            tokens = array("I", prompt)
            if not self._prompts_only:
                tokens.extend(output)
            self._cache.insert(tokens, prefix_salt(self._dp_rank, cache_salt), blocks)

    def kept(self, cached_tokens: int, arrived: Kept = ()) -> Kept:
        """Return what a next transfer has to leave out: what has arrived, and shared blocks always.

        A transfer that goes wrong may report less than it began with.
        """
        if not cached_tokens:
            return arrived
        [of_layers] = arrived or ((0,) * self._layers,)
        return (tuple(max(cached_tokens, tokens) for tokens in of_layers),)

    def check_integrity(self) -> None:
        """Raise BlockPoolCorruptError where the books of pool or cache disagree."""
        if self._cache is not None:
            self._cache.check_integrity()
        else:
            self.pool.check_integrity()
