"""Joins what the ranks of an instance say of a transfer's end. Pure; for one thread at a time.

Each rank sends or receives its part of a sequence for itself. The transfer is complete once all of
them are, and has failed as soon as one is; but its blocks are free only when no rank has to do with
them any more.
"""

from dataclasses import dataclass, field, replace

from kvtransfer import Closed, Completed, Failed, Kept, TransferStats
from kvtransfer.coverage import kept_by_all

End = Completed | Failed | Closed


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What follows from one rank's word.

    Attributes:
        end: The end of the whole transfer, once no rank has a part in it any more.
        give_up: Whether the other ranks are to end theirs, since the transfer cannot succeed.
    """

    end: End | None = None
    give_up: bool = False


@dataclass(kw_only=True)
class _Open:
    ends: dict[int, End] = field(default_factory=dict)
    failed: Failed | None = None


class JoinedEnds:
    """The open transfers of an instance of `ranks` ranks."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._open: dict[int, _Open] = {}

    def begin(self, transfer_id: int) -> None:
        """All ranks have begun a transfer."""
        self._open[transfer_id] = _Open()

    def take(self, rank: int, end: End) -> Joined:
        """A rank's part has ended; repeats, and transfers that are over, change nothing."""
        found = self._open.get(end.transfer_id)
        if found is None or rank in found.ends:
            return Joined()
        found.ends[rank] = end
        fails = isinstance(end, Failed) and found.failed is None
        if isinstance(end, Failed) and found.failed is None:
            found.failed = end
        if len(found.ends) < self._ranks:
            return Joined(give_up=fails)
        del self._open[end.transfer_id]
        ends = list(found.ends.values())
        if found.failed is not None:
            return Joined(end=replace(found.failed, kept=_kept(ends)))
        return Joined(end=_whole(end.transfer_id, ends))


def _kept(ends: list[End]) -> Kept:
    """What all receiving ranks have; where one's part is complete it has everything."""
    of_ranks = [end.kept for end in ends if not isinstance(end, Completed)]
    if not all(of_ranks):
        return ()
    return tuple(kept_by_all(of_group) for of_group in zip(*of_ranks, strict=True))


def _whole(transfer_id: int, ends: list[End]) -> End:
    stats = [end.stats for end in ends if isinstance(end, Completed)]
    if len(stats) < len(ends):
        return Closed(transfer_id, _kept(ends))
    carriers = sorted({each.transport for each in stats if each.transport})
    return Completed(
        transfer_id,
        TransferStats(
            bytes=sum(each.bytes for each in stats),
            messages=sum(each.messages for each in stats),
            seconds=max(each.seconds for each in stats),
            transport=", ".join(carriers),
            hidden_bytes=sum(each.hidden_bytes for each in stats),
        ),
    )
