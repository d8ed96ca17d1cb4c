"""The tokens of requests: random, the same for equal blocks, never the same in two runs. Pure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.workloads.arrivals import Planned

# What a seed is of, so that a block and a request of the same number differ.
_OF_BLOCK, _OF_REQUEST = 0, 1
# Below them are the ids that tokenizers like to give to control tokens.
_FIRST_ID = 100


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Makes prompts of ids below `vocab_size`.

    `run` tells repeats apart: with the same prompts again, a server's prefix cache would answer
    for its prefill.
    """

    seed: int
    run: int
    vocab_size: int

    def of(self, planned: Planned) -> NDArray[np.int64]:
        """Return a request's token ids."""
        arrival = planned.arrival
        if not arrival.blocks:
            return self._tokens(_OF_REQUEST, planned.index, arrival.prompt_tokens)
        blocks = [self._tokens(_OF_BLOCK, block, arrival.block_tokens) for block in arrival.blocks]
        return np.concatenate(blocks)[: arrival.prompt_tokens]

    def _tokens(self, of: int, number: int, count: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, self.run, of, number))
        first = min(_FIRST_ID, self.vocab_size // 2)
        return rng.integers(first, self.vocab_size, count)
