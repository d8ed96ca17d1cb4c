"""How a run is done: with which checkpoints, cores and interpreters, and how often. No I/O."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from bench.decodes.works import LOAD, OVERHEAD, QUICK, QUICK_LOAD, SERVED, WORKS, Load, Work


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every part of the benchmark needs to know.

    Attributes:
        checkpoints: Where checkpoints are kept.
        pattern: What names of rows must match.
        quick: The smallest of each sort of row alone.
    """

    checkpoints: Path
    pattern: str
    rounds: int
    vllm_python: Path | None
    quick: bool
    cores: tuple[int, ...] = field(default_factory=lambda: tuple(sorted(os.sched_getaffinity(0))))

    @property
    def works(self) -> tuple[Work, ...]:
        """Batches that engines decode."""
        return (QUICK,) if self.quick else WORKS

    @property
    def overhead(self) -> Work:
        """The batch whose steps are looked into."""
        return QUICK if self.quick else OVERHEAD

    @property
    def served(self) -> tuple[Work, ...]:
        """Batches that whole systems decode."""
        return (QUICK,) if self.quick else SERVED

    @property
    def load(self) -> Load:
        """Requests under which the time between tokens is measured."""
        return QUICK_LOAD if self.quick else LOAD

    def wants(self, name: str) -> bool:
        """Whether rows of this name are to be measured."""
        return re.search(self.pattern, name) is not None
