"""How a run is done: with which checkpoints, cores and interpreters, and how often. No I/O."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from bench.prefills.works import LONG_TOKENS, WORKS, Work
from prefill.config import PrefillConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every part of the benchmark needs to know.

    Attributes:
        checkpoints: Where checkpoints are kept.
        pattern: What names of rows must match.
        quick: The smallest of each sort of row alone.
        longest: Tokens of the longest prompts to compute.
    """

    checkpoints: Path
    pattern: str
    rounds: int
    vllm_python: Path | None
    quick: bool
    longest: int = 32_768
    cores: tuple[int, ...] = field(default_factory=lambda: tuple(sorted(os.sched_getaffinity(0))))

    @property
    def budget(self) -> int:
        """Tokens of a pass for each cp rank, as prefill serves."""
        return int(PrefillConfig.model_fields["max_batched_tokens"].default)

    @property
    def works(self) -> tuple[Work, ...]:
        """Prompts to compute."""
        works = WORKS[:1] if self.quick else WORKS
        return tuple(work for work in works if work.tokens <= self.longest)

    @property
    def attention_tokens(self) -> int:
        """Of the prompt whose attention is measured alone."""
        return 2048 if self.quick else 32_768

    @property
    def ring_tokens(self) -> tuple[int, ...]:
        """Of the prompts that two ranks compute."""
        return (2048,) if self.quick else (2048, 8192, 32_768)

    @property
    def layout_tokens(self) -> tuple[int, ...]:
        """Of the prompts that two ranks with other layouts compute."""
        return (256,) if self.quick else (2048, 8192)

    @property
    def ring_cached(self) -> int:
        """Tokens cached before the new ones, where the ring's variants are compared."""
        return 512 if self.quick else 4096

    @property
    def ring_new(self) -> tuple[int, ...]:
        """New tokens where the ring's variants are compared."""
        return (16, 512) if self.quick else tuple(1 << power for power in range(4, 13))

    def wants(self, name: str) -> bool:
        """Whether rows of this name are to be measured."""
        return re.search(self.pattern, name) is not None

    def rounds_of(self, tokens: int) -> int:
        """Rounds that are counted: half as many where each takes long, two at least."""
        return max(2, self.rounds // 2) if tokens > LONG_TOKENS else self.rounds
