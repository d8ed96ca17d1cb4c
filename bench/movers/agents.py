"""What the agents of a measured transfer agree on, and how a side waits for what they report."""

import queue
import time

from kvtransfer import Completed, Failed, Identity, TransferEvent, TransferStats

EPOCH, TOKEN, NONCE = 1, b"bench", b"nonce-of-16bytes"
PATIENCE_S = 30.0


def identity(name: str) -> Identity:
    """Return who a side is."""
    return Identity(instance=name, epoch=EPOCH, compatibility=bytes(32), token=TOKEN)


class Events:
    """What the agents of this side report."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[float, TransferEvent]] = queue.SimpleQueue()

    def __call__(self, event: TransferEvent) -> None:
        self._queue.put((time.monotonic(), event))

    def wait(self, kind: type[TransferEvent], count: int) -> float:
        """Wait for so many events of a kind; return when the last one came."""
        until = time.monotonic() + PATIENCE_S
        at = 0.0
        while count:
            at, event = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            if isinstance(event, Failed):
                raise RuntimeError(f"transfer failed: {event.error}")
            count -= isinstance(event, kind)
        return at

    def completed(self, transfer_id: int) -> TransferStats:
        """Wait for one transfer to be completed."""
        while True:
            _, event = self._queue.get(timeout=PATIENCE_S)
            if isinstance(event, Failed):
                raise RuntimeError(f"transfer failed: {event.error}")
            if isinstance(event, Completed) and event.transfer_id == transfer_id:
                return event.stats
