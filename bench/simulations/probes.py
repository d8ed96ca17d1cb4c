"""Measures a running system by single requests, for a simulation of it. Owns what is asked.

Prompts one after another, alone and beside answers under way; then answers side by side. Times are
the client's, and those of prefill and hand-over the ones that answers come with.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from twinpool import AsyncClient
from twinpool.types import RequestStats

_LENGTHS = (64, 128, 256, 512, 768)
_BATCHES = (1, 2, 4, 8)
# Few and many tokens cached: with one length alone, what a step takes for each sequence could not
# be told from what it takes for each token.
_OF_BATCHES = (64, 768)
_FEW, _MANY = 12, 40
_BACKGROUND, _BACKGROUND_PROMPT = 3, 256
_WARM_UP = 4
_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """When the tokens of an answer came, by the client's clock."""

    prompt_tokens: int
    sent_s: float
    came_s: tuple[float, ...]
    stats: RequestStats

    @property
    def ttft_s(self) -> float:
        """From sending to the first token."""
        return self.came_s[0] - self.sent_s

    @property
    def way_s(self) -> float:
        """What of it is neither prefill nor waiting for it."""
        return self.ttft_s - self.stats.queue_s - self.stats.prefill_s

    @property
    def prefilled(self) -> tuple[float, float]:
        """From when to when its prompt was computed, but for the way back."""
        return self.came_s[0] - self.stats.prefill_s, self.came_s[0]

    def gaps(self) -> list[tuple[float, float, int]]:
        """Return (when, seconds, tokens cached) of its decode steps, without the hand-over."""
        return [
            (before, after - before, self.prompt_tokens + number)
            for number, (before, after) in enumerate(pairwise(self.came_s[1:]), start=1)
        ]


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Answers to prompts by themselves, to others side by side, and to both at once.

    Those of a batch, and of a background, were under way together.
    """

    alone: Sequence[Answer]
    batches: Sequence[Sequence[Answer]]
    beside: Sequence[Answer]
    background: Sequence[Sequence[Answer]]

    def __add__(self, other: "Probed") -> "Probed":
        return Probed(
            alone=[*self.alone, *other.alone],
            batches=[*self.batches, *other.batches],
            beside=[*self.beside, *other.beside],
            background=[*self.background, *other.background],
        )


class Prober:
    """Asks one system; prompts are of random tokens, so that none is cached."""

    def __init__(self, client: AsyncClient, vocab_size: int, seed: int = 0) -> None:
        self._client = client
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(seed)

    async def probe(self, rounds: int) -> Probed:
        """Ask everything; raises TwinpoolError."""
        for _ in range(_WARM_UP):
            await self._ask(max(_LENGTHS), _FEW)
        lengths = _LENGTHS * rounds
        alone = [await self._ask(length, _FEW) for length in lengths]
        batches = [
            await asyncio.gather(*(self._ask(length, _MANY) for _ in range(batch)))
            for batch in _BATCHES
            for length in _OF_BATCHES
            for _ in range(max(1, rounds // len(_OF_BATCHES)))
        ]
        under_way = [
            asyncio.create_task(self._ask(_BACKGROUND_PROMPT, _MANY * rounds * len(_LENGTHS)))
            for _ in range(_BACKGROUND)
        ]
        await asyncio.sleep(1.0)
        beside = []
        for length in lengths:
            if any(task.done() for task in under_way):
                break
            beside.append(await self._ask(length, 2))
        background = await asyncio.gather(*under_way)
        return Probed(alone=alone, batches=batches, beside=beside, background=[background])

    async def _ask(self, prompt_tokens: int, new_tokens: int) -> Answer:
        prompt = self._rng.integers(100, self._vocab_size, prompt_tokens).tolist()
        sent_s, came_s = time.perf_counter(), []
        stats: RequestStats | None = None
        async with self._client.generate(
            prompt, max_new_tokens=new_tokens, ignore_eos=True, timeout_s=_TIMEOUT_S
        ) as stream:
            async for chunk in stream:
                came_s += [time.perf_counter()] * len(chunk.token_ids)
                stats = chunk.stats or stats
        assert stats is not None
        return Answer(prompt_tokens=prompt_tokens, sent_s=sent_s, came_s=tuple(came_s), stats=stats)
