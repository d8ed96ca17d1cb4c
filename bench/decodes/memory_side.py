"""How fast this machine's memory can be read, with as many threads as the others compute with.

The buffer is much larger than the caches, and has been written to: pages that have not are read as
zeros at a rate that no memory has.
"""

import time
from typing import Any

import torch

from bench.sides.answers import serve

_BYTES = 1 << 29
_TRIES = 5


class Memory:
    """A buffer."""

    def __init__(self) -> None:
        self._words = torch.ones(_BYTES // 8, dtype=torch.int64)

    def read(self) -> dict[str, Any]:
        """Answer with the bytes per second of the fastest of some tries, each of the whole."""
        return {"bytes_per_s": _BYTES / min(self._read_s() for _ in range(_TRIES))}

    def _read_s(self) -> float:
        began = time.perf_counter()
        # A comparison for each word: of torch's reductions none is faster.
        self._words.amax()
        return time.perf_counter() - began


if __name__ == "__main__":
    side = Memory()
    serve({"read": side.read})
