"""Decides which sequences the next decode step works on.

Owns the running batch of each dp rank and the order in which sequences join it. Knows nothing of
tensors, threads or block ids: its caller says which sequences have no room for their next token.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice

Step = tuple[tuple[int, ...], ...]  # request ids, of each dp rank


@dataclass(kw_only=True)
class _Share:
    """The sequences of one dp rank; those of steps under way are in `running` and not `idle`."""

    waiting: OrderedDict[int, None] = field(default_factory=OrderedDict)
    running: OrderedDict[int, None] = field(default_factory=OrderedDict)
    idle: OrderedDict[int, None] = field(default_factory=OrderedDict)


class Scheduler:
    """Sequences join when they are ready and there is room, and leave when they end.

    A sequence's next token needs the one before. So where several steps are under way at once,
    each has a part of the sequences: as equal as may be, and the same ones stay together.

    Args:
        max_batch: Sequences of one dp rank that are stepped with at most.
        dp: How many dp ranks there are; each sequence is one's.
        depth: How many steps may be under way at once.
    """

    def __init__(self, *, max_batch: int, dp: int = 1, depth: int = 1) -> None:
        self._max_batch = max_batch
        self._depth = depth
        self._shares = [_Share() for _ in range(dp)]
        self._dp_rank_of: dict[int, int] = {}

    def add(self, request_id: int, dp_rank: int = 0) -> None:
        """A sequence's KV and its first token are here."""
        self._dp_rank_of[request_id] = dp_rank
        self._shares[dp_rank].waiting[request_id] = None

    def remove(self, request_id: int) -> None:
        """A sequence has ended, wherever it is; not while a step with it is under way."""
        dp_rank = self._dp_rank_of.pop(request_id, None)
        if dp_rank is not None:
            share = self._shares[dp_rank]
            for group in (share.waiting, share.running, share.idle):
                group.pop(request_id, None)

    @property
    def running(self) -> int:
        """Sequences in the batches."""
        return sum(len(share.running) for share in self._shares)

    @property
    def waiting(self) -> int:
        """Sequences that are ready but find no room."""
        return sum(len(share.waiting) for share in self._shares)

    @property
    def idle(self) -> list[int]:
        """Sequences in the batches that are in no step under way."""
        return [request_id for share in self._shares for request_id in share.idle]

    def schedule(self, without: Collection[int] = ()) -> Step:
        """The next step, which is under way from here on; empty where nothing can step now.

        Of each dp rank, those whose latest step is longest ago, `without` those that have to wait.
        """
        step = tuple(tuple(self._begin(share, without)) for share in self._shares)
        return step if any(step) else ()

    def finished(self, step: Step) -> None:
        """A step is over; its sequences may step again."""
        for share, request_ids in zip(self._shares, step, strict=True):
            share.idle.update((r, None) for r in request_ids if r in share.running)

    def _begin(self, share: _Share, without: Collection[int]) -> Iterable[int]:
        while share.waiting and len(share.running) < self._max_batch:
            request_id, _ = share.waiting.popitem(last=False)
            share.running[request_id] = share.idle[request_id] = None
        most = -(-len(share.running) // self._depth)
        able = (request_id for request_id in share.idle if request_id not in without)
        for request_id in list(islice(able, most)):
            del share.idle[request_id]
            yield request_id
