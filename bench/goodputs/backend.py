"""What requests are sent over. Owns the seam between the load and a kind of server."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.goodputs.records import Outcome


class SendError(Exception):
    """A request was not answered to its end; `outcome` says in which way."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server says of itself."""

    model: str
    version: str
    vocab_size: int | None = None
    max_context: int | None = None


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of an answer.

    Attributes:
        has_tokens: Whether it counts as one that brings tokens: its arrival is then timed.
        ends_prefill: Whether all that it tells is that prefill has ended; the first token is then
            decode's to bring.
        usage: The tokens of prompt and answer as the server counted them, at the end.
    """

    has_tokens: bool
    ends_prefill: bool = False
    usage: tuple[int, int] | None = None


class Backend(Protocol):
    """A server; a request is made ready before it is due, and sent when it is."""

    async def describe(self) -> Served:
        """Ask what is served; raises SendError."""
        ...

    def prepare(self, prompt: NDArray[np.int64], output_tokens: int) -> Any:
        """Return what `send` takes. Called in a thread."""
        ...

    def send(self, prepared: Any) -> AsyncGenerator[Message]:
        """Send a request and return its answer as it comes; raises SendError."""
        ...

    async def close(self) -> None:
        """Drop what is open."""
        ...
