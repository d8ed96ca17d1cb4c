"""How a run is done: on which cores, for how long, beside whom. No I/O."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every part of the benchmark needs to know.

    Attributes:
        pattern: What names of rows must match.
        minutes: How long streams are watched.
        quick: The smallest of each sort of row alone.
    """

    pattern: str
    minutes: int
    peer_python: Path | None
    quick: bool
    cores: tuple[int, ...] = field(default_factory=lambda: tuple(sorted(os.sched_getaffinity(0))))

    @property
    def load_core(self) -> int:
        """The core of mocks and clients."""
        return self.cores[-1]

    @property
    def router_cores(self) -> tuple[int, ...]:
        """The cores that are left to routers; the same one where there is no other."""
        return self.cores[:-1] or self.cores

    @property
    def streams(self) -> int:
        """Answers at any time."""
        return 24 if self.quick else 1000

    @property
    def decodes(self) -> int:
        """Mock decode instances; there is a fourth as many of prefill."""
        return 2 if self.quick else 16

    @property
    def sequences(self) -> int:
        """What each of them can take at once: its share of the streams, and some more."""
        return -(-self.streams // self.decodes) + 8

    @property
    def answer_tokens(self) -> int:
        """Tokens of one answer."""
        return 128 if self.quick else 1024

    @property
    def settle_s(self) -> float:
        """Seconds until what was begun together has settled."""
        return 0.5 if self.quick else 8.0

    @property
    def window_s(self) -> float:
        """Seconds of one round."""
        return 0.5 if self.quick else 3.0

    @property
    def minute_s(self) -> float:
        """Seconds of a minute."""
        return 1.0 if self.quick else 60.0

    def wants(self, name: str) -> bool:
        """Whether rows of this name are to be measured."""
        return re.search(self.pattern, name) is not None
