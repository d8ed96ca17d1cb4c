"""Which blocks of a cache are whose. Owns block ids and nothing else: no requests, no memory.

A block has two kinds of owner. The sequence that reserved it releases it once; readers and
writers of a transfer pin it while they can still reach it. It is free only when it is both
released and unpinned; a block that is released but pinned is quarantined, because a late
write may still land in it. Not thread-safe: one thread, the scheduler's, calls it.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from engine.errors import BlockPoolCorruptError, BlockStateError, OutOfBlocks


class _State(Enum):
    FREE = "free"
    RESERVED = "reserved"
    USED = "used"
    QUARANTINED = "quarantined"


_OWNED = (_State.RESERVED, _State.USED)


@dataclass(frozen=True, kw_only=True)
class BlockCounts:
    """How many blocks are in each state; the four states add up to `total`."""

    total: int
    free: int
    reserved: int
    used: int
    quarantined: int


class BlockPool:
    """Hands out block ids from 0 to `num_blocks` - 1."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; a pool needs at least one block")
        self._states = [_State.FREE] * num_blocks
        self._pins = [0] * num_blocks
        self._counts = Counter({_State.FREE: num_blocks})
        self._extents = _FreeExtents()
        self._extents.add(0, num_blocks)

    def reserve(self, n: int) -> list[int]:
        """Take `n` free blocks for a sequence, as one contiguous extent where there is one.

        The smallest extent that fits is used; without one, the fewest extents that do.
        Raises OutOfBlocks where fewer than `n` are free; nothing is taken then.
        """
        if n < 1:
            raise ValueError(f"cannot reserve {n} blocks; at least 1")
        if n > self._counts[_State.FREE]:
            raise OutOfBlocks(needed=n, free=self._counts[_State.FREE])
        ids = self._extents.take(n)
        self._move(ids, _State.RESERVED)
        return ids

    def mark_used(self, ids: Sequence[int]) -> None:
        """Note that a sequence runs on blocks that it had reserved; used ones may be named again.

        Raises BlockStateError where one is not owned by a sequence; nothing is changed then.
        """
        self._check(ids, _OWNED, "mark as used")
        self._move(ids, _State.USED)

    def release(self, ids: Sequence[int]) -> None:
        """Give back the sequence's ownership; what is pinned goes to quarantine.

        Raises BlockStateError where one is not owned by a sequence; nothing is changed then.
        """
        self._check(ids, _OWNED, "release")
        self._move([i for i in ids if self._pins[i]], _State.QUARANTINED)
        self._free([i for i in ids if not self._pins[i]])

    def pin(self, ids: Sequence[int]) -> None:
        """Note one more reader or writer of blocks that a sequence owns.

        Raises BlockStateError where one is not owned by a sequence; nothing is changed then.
        """
        self._check(ids, _OWNED, "pin")
        for i in ids:
            self._pins[i] += 1

    def unpin(self, ids: Sequence[int]) -> None:
        """Note that a reader or writer can no longer reach the blocks.

        Raises BlockStateError where one is not pinned; nothing is changed then.
        """
        self._check(ids, (*_OWNED, _State.QUARANTINED), "unpin")
        for i in ids:
            if not self._pins[i]:
                raise BlockStateError(f"cannot unpin block {i}: it is not pinned")
        for i in ids:
            self._pins[i] -= 1
        self._free([i for i in ids if not self._pins[i] and self._states[i] is _State.QUARANTINED])

    def counts(self) -> BlockCounts:
        """Return how many blocks are in each state."""
        return BlockCounts(
            total=len(self._states),
            free=self._counts[_State.FREE],
            reserved=self._counts[_State.RESERVED],
            used=self._counts[_State.USED],
            quarantined=self._counts[_State.QUARANTINED],
        )

    def check_integrity(self) -> None:
        """Recount everything; raises BlockPoolCorruptError where the books disagree."""
        if +self._counts != Counter(self._states):
            raise BlockPoolCorruptError(f"counts {self._counts} against {Counter(self._states)}")
        free = [i for i, state in enumerate(self._states) if state is _State.FREE]
        if [(run[0], len(run)) for run in _runs(free)] != self._extents.sorted():
            raise BlockPoolCorruptError("free extents do not match the free blocks")
        for i, (state, pins) in enumerate(zip(self._states, self._pins, strict=True)):
            if pins < 0 or (state is _State.FREE and pins):
                raise BlockPoolCorruptError(f"block {i} is {state.value} with {pins} pins")
            if state is _State.QUARANTINED and not pins:
                raise BlockPoolCorruptError(f"block {i} is in quarantine, but nobody pins it")

    def _check(self, ids: Sequence[int], allowed: tuple[_State, ...], action: str) -> None:
        if len(set(ids)) != len(ids):
            raise BlockStateError(f"cannot {action} blocks: an id is given twice")
        for i in ids:
            if not 0 <= i < len(self._states):
                raise BlockStateError(f"cannot {action} block {i}: there is no such block")
            if self._states[i] not in allowed:
                raise BlockStateError(f"cannot {action} block {i}: it is {self._states[i].value}")

    def _move(self, ids: Iterable[int], state: _State) -> None:
        for i in ids:
            self._counts[self._states[i]] -= 1
            self._counts[state] += 1
            self._states[i] = state

    def _free(self, ids: Sequence[int]) -> None:
        self._move(ids, _State.FREE)
        for run in _runs(sorted(ids)):
            self._extents.add(run[0], len(run))


class _FreeExtents:
    """Runs of free blocks, maximal and disjoint, found by either end and by length."""

    def __init__(self) -> None:
        self._length_at: dict[int, int] = {}  # first block -> length
        self._start_before: dict[int, int] = {}  # one past the last block -> first block
        self._by_length: list[tuple[int, int]] = []  # (length, first block), sorted

    def sorted(self) -> list[tuple[int, int]]:
        return sorted(self._length_at.items())

    def add(self, start: int, length: int) -> None:
        """Add a run, merged with the free runs that touch it."""
        before = self._start_before.get(start)
        if before is not None:
            self._remove(before)
            start, length = before, length + start - before
        after = self._length_at.get(start + length)
        if after is not None:
            self._remove(start + length)
            length += after
        self._length_at[start] = length
        self._start_before[start + length] = start
        insort(self._by_length, (length, start))

    def take(self, n: int) -> list[int]:
        """Remove `n` blocks, which must be there, from as few runs as possible."""
        taken: list[int] = []
        while n:
            fitting = bisect_left(self._by_length, (n, -1))
            length, start = self._by_length[min(fitting, len(self._by_length) - 1)]
            self._remove(start)
            part = min(n, length)
            taken.extend(range(start, start + part))
            if part < length:
                self.add(start + part, length - part)
            n -= part
        return taken

    def _remove(self, start: int) -> None:
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]


def _runs(ids: Iterable[int]) -> Iterator[list[int]]:
    """Yield the maximal runs of consecutive numbers in ascending `ids`."""
    run: list[int] = []
    for i in ids:
        if run and i != run[-1] + 1:
            yield run
            run = []
        run.append(i)
    if run:
        yield run
