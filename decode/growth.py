"""Who gets the next blocks where sequences outgrow what was reserved for them, and who goes.

Decides for one dp rank; takes no block and ends nobody. Where there are too few, the sequence whose
request came last is handed back for the others, and waits at its router, which has it go on later.

That ends for all of them: when a request came is the same in all of its tries, so that only the
finitely many before it can ever take its room. The first of those that are here is never handed
back, and fits even alone, so it runs to its end; then another one is first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from engine.blocks import BlockCounts


class Growing(Protocol):
    """What matters of a sequence."""

    handed_back: bool

    @property
    def came(self) -> tuple[int, int]:
        """Sorts sequences by when their requests came; no two are alike."""
        ...


_S = TypeVar("_S", bound=Growing)


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[_S]):
    """Of those that lack a block: who gets one, and who waits; and who is to go for them."""

    grow: Sequence[_S]
    wait: Sequence[_S]
    hand_back: _S | None = None


def plan_growth(lacking: Sequence[_S], held: Sequence[_S], counts: BlockCounts) -> Plan[_S]:
    """Decide who of `held`, all that have blocks of `counts`, gets the next ones.

    One at most is to go at a time, and nobody while blocks are about to come back: those of one
    that goes, and those in quarantine, to which a sender may still write.
    """
    # The earliest first: it is the one that must not wait in vain.
    turns = sorted((s for s in lacking if not s.handed_back), key=lambda s: s.came)
    grow, wait = turns[: counts.available], turns[counts.available :]
    is_room_coming = counts.quarantined > 0 or any(s.handed_back for s in held)
    if not wait or is_room_coming:
        return Plan(grow=grow, wait=wait)
    # A sequence that is alone has all blocks, and they are enough, or it would not be here.
    assert len(held) > 1, "a sequence lacks a block that nobody has"
    return Plan(grow=grow, wait=wait, hand_back=max(held, key=lambda s: s.came))
