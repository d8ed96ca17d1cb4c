"""What is computed: prompts, and the passes that a token budget makes of them. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Work:
    """`count` prompts of `tokens` tokens each, which arrive together."""

    tokens: int
    count: int

    @property
    def name(self) -> str:
        """What a row is called."""
        return f"{self.tokens:,} x {self.count}"

    @property
    def all_tokens(self) -> int:
        """Tokens of all prompts."""
        return self.tokens * self.count

    @property
    def is_long(self) -> bool:
        """Whether a round takes so long that few of them must do."""
        return self.all_tokens > LONG_TOKENS


LONG_TOKENS = 16_384
WORKS = (
    Work(tokens=128, count=16),
    Work(tokens=2048, count=4),
    Work(tokens=8192, count=1),
    Work(tokens=32_768, count=1),
)
# What a long work is warmed up with: the same kind of passes, but few of them.
WARM_UP = Work(tokens=4096, count=1)


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `end` of prompt `prompt`: one chunk of a pass."""

    prompt: int
    start: int
    end: int


def passes(work: Work, budget: int) -> list[list[Span]]:
    """Return the passes, each of at most `budget` tokens: prompt after prompt, none left out."""
    made: list[list[Span]] = [[]]
    room = budget
    for prompt in range(work.count):
        start = 0
        while start < work.tokens:
            if not room:
                made.append([])
                room = budget
            end = min(work.tokens, start + room)
            made[-1].append(Span(prompt, start, end))
            room -= end - start
            start = end
    return made


def block_table(work: Work, prompt: int, block_tokens: int) -> range:
    """Return the cache blocks of a prompt; prompts lie one after another."""
    each = math.ceil(work.tokens / block_tokens)
    return range(prompt * each, (prompt + 1) * each)


def blocks(works: Sequence[Work], block_tokens: int) -> int:
    """Return how many blocks a cache needs for any one of the works."""
    return max(work.count * math.ceil(work.tokens / block_tokens) for work in works)


def prompts(work: Work, vocab_size: int, number: int) -> list[list[int]]:
    """Return the token ids of round `number`, the same for everybody."""
    random = np.random.default_rng(number)
    ids: list[list[int]] = random.integers(vocab_size, size=(work.count, work.tokens)).tolist()
    return ids
