"""What a process of ours needs to be one side of a `pair`: the loop over lines, and a pool.

Owns memory and its pattern; knows nothing of how bytes move.
"""

import mmap
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bench.sides import answers

_FLUSH_BYTES = 64 * 1024 * 1024
# Steps of progress between two looks at the input, each of which is a system call.
_STEPS = 32


class Side(Protocol):
    """What answers a pair's lines; `pair` says what each of them means."""

    def open(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Make the pool and whatever moves its bytes; each way has options of its own."""
        ...

    def meet(self, *, peer: dict[str, Any]) -> dict[str, Any]:
        """Connect."""
        ...

    def prepare(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Get ready for one round."""
        ...

    def go(self) -> dict[str, Any]:
        """Move."""
        ...

    def finish(self) -> dict[str, Any]:
        """Wait for the end of what the other side does."""
        ...

    def check(self) -> dict[str, Any]:
        """Raise ValueError where bytes are wrong."""
        ...

    def progress(self) -> bool:
        """Do what can be done now; False where nothing is expected, so that the side may sleep."""
        ...


def serve(side: Side) -> None:
    """Answer a pair's lines until there are no more, then end this process at once."""
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "open": side.open,
        "meet": side.meet,
        "prepare": side.prepare,
        "go": side.go,
        "finish": side.finish,
        "check": side.check,
    }
    answers.serve(commands, lambda: _next_line(side))


def _next_line(side: Side) -> bytes:
    # One line is under way at most, so nothing waits in the buffer while select looks.
    while side.progress():
        for _ in range(_STEPS):
            side.progress()
        if select.select([sys.stdin], [], [], 0)[0]:
            break
    return sys.stdin.buffer.readline()


class Pool:
    """Slices in page-aligned memory. Each word of a source says which slice and word it is."""

    def __init__(self, slices: int, slice_bytes: int, *, filled: bool) -> None:
        """Make [slices, slice_bytes] bytes, with the pattern or with zeros."""
        self._words_SW = np.frombuffer(
            mmap.mmap(-1, slices * slice_bytes), dtype=np.uint64
        ).reshape(slices, slice_bytes // 8)
        for index in range(slices):
            self._words_SW[index] = self._pattern(index) if filled else 0
        self._flush = np.ones(_FLUSH_BYTES, dtype=np.uint8)

    @property
    def bytes_SB(self) -> npt.NDArray[np.uint8]:
        """All slices, as bytes."""
        return self._words_SW.view(np.uint8)

    def clear(self, indices: Sequence[int]) -> None:
        """Forget what earlier rounds left in these slices."""
        for index in indices:
            self._words_SW[index] = 0

    def flush_caches(self) -> None:
        """Drive the pool out of this core's caches and the shared one."""
        self._flush += 1

    def check(self, indices: Sequence[int], sources: Sequence[int]) -> None:
        """Raise ValueError unless these slices hold what the source slices do."""
        for index, source in zip(indices, sources, strict=True):
            if not np.array_equal(self._words_SW[index], self._pattern(source)):
                raise ValueError(f"slice {index} does not hold the bytes of source {source}")

    def _pattern(self, index: int) -> npt.NDArray[np.uint64]:
        words = self._words_SW.shape[1]
        return np.arange(index << 32, (index << 32) + words, dtype=np.uint64)
