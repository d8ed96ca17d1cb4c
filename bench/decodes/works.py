"""What is decoded: batches that stay as they are, and a load in which requests come and go. Pure.

A request, as sides are asked it, is its prompt and how many tokens it is to get.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.prefills import works as prefill_works
from bench.prefills.works import BLOCK_SIZE

_MANY_TOKENS = 64 * 1024

Request = tuple[list[int], int]


@dataclass(frozen=True, kw_only=True)
class Work:
    """`batch` sequences after `context` tokens each, which get `steps` more tokens together."""

    batch: int
    context: int
    steps: int = 64

    @property
    def name(self) -> str:
        """What a row is called."""
        return f"batch {self.batch} x {self.context:,}"

    @property
    def tokens(self) -> int:
        """Of a sequence at its end, the one that comes before the first step included."""
        return self.context + self.steps + 1

    @property
    def mean_cached(self) -> float:
        """Tokens of a sequence that a step looks at, over all steps."""
        return self.context + (self.steps + 1) / 2

    @property
    def blocks(self) -> int:
        """Cache blocks of all sequences."""
        return self.batch * math.ceil(self.tokens / BLOCK_SIZE)


def _work(batch: int, context: int) -> Work:
    return Work(batch=batch, context=context, steps=64 if batch * context < _MANY_TOKENS else 32)


WORKS = tuple(itertools.starmap(_work, itertools.product((1, 4, 16, 32), (128, 1024, 4096))))
# Served, its sequences begin some steps apart, and must have many left together.
QUICK = Work(batch=2, context=40, steps=48)
OVERHEAD = Work(batch=32, context=1024)
SERVED = (Work(batch=1, context=1024), Work(batch=16, context=1024))


def prompts(work: Work, vocab_size: int, number: int) -> list[list[int]]:
    """Return the token ids of round `number`, the same for everybody."""
    asked = prefill_works.Work(tokens=work.context, count=work.batch)
    return prefill_works.prompts(asked, vocab_size, number)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests of which each that ends makes room for another: a steady number is under way.

    With requests that come at random the number of sequences in a step is random too, and a step's
    time follows it: with experts nearly in proportion. That says nothing of joining and leaving.

    Attributes:
        in_flight: Requests under way at once.
        count: Of all requests.
        prompt: Tokens of each; few enough for prefill to keep up.
        least_tokens: That a request gets; how many is random.
        most_tokens: That a request gets.
    """

    in_flight: int = 8
    count: int = 96
    prompt: int = 64
    least_tokens: int = 32
    most_tokens: int = 96

    @property
    def tokens(self) -> int:
        """Of the longest sequence at its end."""
        return self.prompt + self.most_tokens

    def requests(self, vocab_size: int, number: int) -> list[Request]:
        """Return the requests of round `number`, the same for everybody."""
        random = np.random.default_rng(number)
        asked = random.integers(vocab_size, size=(self.count, self.prompt)).tolist()
        tokens = random.integers(self.least_tokens, self.most_tokens + 1, size=self.count).tolist()
        return list(zip(asked, tokens, strict=True))


LOAD = Load()
QUICK_LOAD = Load(in_flight=2, count=8, prompt=40, least_tokens=8, most_tokens=16)


def together(work: Work, asked: Sequence[list[int]]) -> list[Request]:
    """Return the requests of a batch, a token before its first step."""
    return [(prompt, work.steps + 1) for prompt in asked]
