"""Decides which sequences the next decode step works on.

Owns the running batch and the order in which sequences join it. Knows nothing of tensors, threads
or block ids. Every sequence here has its whole KV reserved, so none is ever preempted.
"""

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Scheduler:
    """Sequences join when they are ready and there is room, and leave when they end.

    Attributes:
        max_batch: Sequences one step works on at most.
    """

    max_batch: int
    _waiting: OrderedDict[int, None] = field(default_factory=OrderedDict)
    _running: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def add(self, request_id: int) -> None:
        """A sequence's KV and its first token are here."""
        self._waiting[request_id] = None

    def remove(self, request_id: int) -> None:
        """A sequence has ended, wherever it is."""
        self._waiting.pop(request_id, None)
        self._running.pop(request_id, None)

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that are ready but find no room."""
        return len(self._waiting)

    def schedule(self) -> tuple[int, ...]:
        """The request ids of the next step's batch, longest running first."""
        while self._waiting and len(self._running) < self.max_batch:
            request_id, _ = self._waiting.popitem(last=False)
            self._running[request_id] = None
        return tuple(self._running)
