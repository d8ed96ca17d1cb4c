"""Requests to several servers alike, each of them in turn."""

from collections.abc import AsyncGenerator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.goodputs.backend import Backend, Message, Served

_Prepared = tuple[Backend, Any]


class TurnsBackend:
    """Servers of the same model, asked round robin in the order in which requests are prepared."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = tuple(backends)
        self._turns = cycle(self._backends)

    async def describe(self) -> Served:
        """Ask all what they serve, and return what the first one says; raises SendError."""
        first, *_ = [await backend.describe() for backend in self._backends]
        return first

    def prepare(self, prompt: NDArray[np.int64], output_tokens: int) -> _Prepared:
        """Return what `send` takes."""
        backend = next(self._turns)
        return backend, backend.prepare(prompt, output_tokens)

    def send(self, prepared: _Prepared) -> AsyncGenerator[Message]:
        """Send a request and return its answer as it comes; raises SendError."""
        backend, of_backend = prepared
        return backend.send(of_backend)

    async def close(self) -> None:
        """Drop what is open."""
        for backend in self._backends:
            await backend.close()
