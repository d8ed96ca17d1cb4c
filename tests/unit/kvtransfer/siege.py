"""Live agents under a fire of messages that are almost right.

Owns what both sieges share: what an agent said, when it has taken everything in, what it logged.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvtransfer import Closed, Completed, Failed, TransferEvent
from tests.unit.kvtransfer.agents import WAIT_S

FENCE = 0xFE4CE
_TURNS = 3


class Breach(AssertionError):
    """An agent did what no message must make it do."""


class Errors(logging.Handler):
    """What the agents log as errors of their own; none may be."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what was logged."""
        self.texts.append(self.format(record))

    def __enter__(self) -> "Errors":
        logger = logging.getLogger("kvtransfer")
        logger.addHandler(self)
        self._before = logger.level
        logger.setLevel(logging.ERROR)
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("kvtransfer")
        logger.removeHandler(self)
        logger.setLevel(self._before)


class Watch:
    """What an agent said of each transfer, and a way to know that it has seen all so far."""

    def __init__(self, on_over: Callable[[int], None] = lambda _: None) -> None:
        self._on_over = on_over
        self._closed = threading.Semaphore(0)
        self.said: dict[int, list[TransferEvent]] = {}

    def __call__(self, event: TransferEvent) -> None:
        """Take an event from the agent's thread."""
        if not isinstance(event, Completed | Failed | Closed):
            return
        if event.transfer_id == FENCE:
            self._closed.release()
            return
        self.said.setdefault(event.transfer_id, []).append(event)
        self._on_over(event.transfer_id)

    def fence(self, end: Callable[[int], None]) -> None:
        """Return when the agent has handled all that was sent before.

        `end` is its revoke or abort. A call is taken before the messages of its turn, and these may
        have been picked up a turn earlier: hence three.
        """
        for _ in range(_TURNS):
            end(FENCE)
            if not self._closed.acquire(timeout=WAIT_S):
                raise Breach("the agent does not answer any more")

    def outcome(self, transfer_id: int) -> TransferEvent | None:
        """Return the one Completed or Failed of a transfer; Breach where there were more."""
        said = [e for e in self.said.get(transfer_id, ()) if not isinstance(e, Closed)]
        if len(said) > 1:
            raise Breach(f"more than one outcome: {said}")
        return said[0] if said else None


@dataclass
class Tally:
    """How many messages were changed, and the last change, to be told with a breach."""

    count: int = 0
    last: str = ""

    def note(self, what: str) -> None:
        """Count one changed message."""
        self.count += 1
        self.last = what


class Siege(Protocol):
    """What `besiege` runs."""

    tally: Tally

    def round(self) -> None:
        """Play one transfer with wrong messages in it; raises Breach."""
        ...

    def close(self) -> None:
        """End the agents."""
        ...


def besiege(siege: Siege, count: int) -> None:
    """Play rounds until so many messages were changed, and close.

    Raises Breach for any harm, and for an error that an agent logs of itself.
    """
    with Errors() as errors:
        try:
            while siege.tally.count < count:
                siege.round()
                if errors.texts:
                    raise Breach(f"after {siege.tally.last}: {errors.texts[0]}")
        finally:
            siege.close()
        if errors.texts:
            raise Breach(f"while closing: {errors.texts[0]}")
