"""Which blocks of a cache are whose. Owns block ids and nothing else: no requests, no memory.

A block has two kinds of owner. The sequence that reserved it releases it once; readers and
writers of a transfer pin it while they can still reach it. It is free only when it is both
released and unpinned; a block that is released but pinned is quarantined, because a late
write may still land in it. A cache may remember what a block contains: further sequences can
then share it, and once nobody holds it, it stays as it is until somebody needs the room.
Not thread-safe: one thread, the scheduler's, calls it.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from engine.errors import BlockPoolCorruptError, BlockStateError, OutOfBlocks


class _State(Enum):
    FREE = "free"
    RESERVED = "reserved"
    USED = "used"
    CACHED = "cached"
    QUARANTINED = "quarantined"


_OWNED = (_State.RESERVED, _State.USED)


@dataclass(frozen=True, kw_only=True)
class BlockCounts:
    """How many blocks are in each state; the five states add up to `total`.

    `cached` are those that nobody holds; a block in a cache that somebody holds counts as that.
    """

    total: int
    free: int
    reserved: int
    used: int
    quarantined: int
    cached: int = 0

    @property
    def available(self) -> int:
        """Blocks that `reserve` can hand out: the free ones, and cached ones in their place."""
        return self.free + self.cached


class BlockCache(Protocol):
    """What remembers the contents of blocks, and knows which of them to give up first."""

    def idle(self, ids: Sequence[int]) -> None:
        """Note that nobody holds these remembered blocks any more."""

    def taken(self, ids: Sequence[int]) -> None:
        """Note that somebody holds these idle blocks again."""

    def evict(self, n: int) -> None:
        """Have the pool `forget` exactly `n` idle blocks, which must be there."""


class BlockPool:
    """Hands out block ids from 0 to `num_blocks` - 1."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; a pool needs at least one block")
        self._states = [_State.FREE] * num_blocks
        self._owners = [0] * num_blocks
        self._pins = [0] * num_blocks
        self._remembered: set[int] = set()
        self._cache: BlockCache | None = None
        self._counts = Counter({_State.FREE: num_blocks})
        self._extents = _FreeExtents()
        self._extents.add(0, num_blocks)

    def attach(self, cache: BlockCache) -> None:
        """Have `cache` told which blocks it may give up; a pool has one cache at most."""
        if self._cache is not None:
            raise ValueError("the pool has a cache already")
        self._cache = cache

    def reserve(self, n: int) -> list[int]:
        """Take `n` blocks for a sequence, as one contiguous extent where there is one.

        The smallest extent that fits is used; without one, the fewest extents that do. Where
        too few are free, the cache gives up as many as are missing.
        Raises OutOfBlocks where fewer than `n` are available; nothing is taken then.
        """
        if n < 1:
            raise ValueError(f"cannot reserve {n} blocks; at least 1")
        available = self.counts().available
        if n > available:
            raise OutOfBlocks(needed=n, free=available)
        missing = n - self._counts[_State.FREE]
        if missing > 0:
            assert self._cache is not None
            self._cache.evict(missing)
        ids = self._extents.take(n)
        for i in ids:
            self._owners[i] = 1
        self._move(ids, _State.RESERVED)
        return ids

    def share(self, ids: Sequence[int]) -> None:
        """Make one more sequence an owner of remembered blocks, held or not.

        Raises BlockStateError where one is not remembered; nothing is changed then.
        """
        self._check(ids, (*_OWNED, _State.CACHED, _State.QUARANTINED), "share")
        self._check_remembered(ids, True, "share")
        idle = [i for i in ids if self._states[i] is _State.CACHED]
        self._move([i for i in ids if not self._owners[i]], _State.RESERVED)
        for i in ids:
            self._owners[i] += 1
        if idle:
            assert self._cache is not None
            self._cache.taken(idle)

    def remember(self, ids: Sequence[int]) -> None:
        """Note, for the cache, that it has the contents of blocks that a sequence owns.

        Raises BlockStateError where one is not owned, or remembered; nothing is changed then.
        """
        if self._cache is None:
            raise BlockStateError("cannot remember blocks: the pool has no cache")
        self._check(ids, _OWNED, "remember")
        self._check_remembered(ids, False, "remember")
        self._remembered.update(ids)

    def forget(self, ids: Sequence[int]) -> None:
        """Note, for the cache, that it gave blocks up: idle ones are free, others stay as held.

        Raises BlockStateError where one is not remembered; nothing is changed then.
        """
        self._check(ids, tuple(_State), "forget")
        self._check_remembered(ids, True, "forget")
        self._remembered.difference_update(ids)
        self._free([i for i in ids if self._states[i] is _State.CACHED])

    def mark_used(self, ids: Sequence[int]) -> None:
        """Note that a sequence runs on blocks that it had reserved; used ones may be named again.

        Raises BlockStateError where one is not owned by a sequence; nothing is changed then.
        """
        self._check(ids, _OWNED, "mark as used")
        self._move(ids, _State.USED)

    def release(self, ids: Sequence[int]) -> None:
        """Give back one sequence's ownership; what nobody owns but is pinned goes to quarantine.

        Raises BlockStateError where one is not owned by a sequence; nothing is changed then.
        """
        self._check(ids, _OWNED, "release")
        for i in ids:
            self._owners[i] -= 1
        self._settle([i for i in ids if not self._owners[i]])

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
        self._settle([i for i in ids if not self._pins[i] and not self._owners[i]])

    def counts(self) -> BlockCounts:
        """Return how many blocks are in each state."""
        return BlockCounts(
            total=len(self._states),
            free=self._counts[_State.FREE],
            reserved=self._counts[_State.RESERVED],
            used=self._counts[_State.USED],
            quarantined=self._counts[_State.QUARANTINED],
            cached=self._counts[_State.CACHED],
        )

    def remembered(self) -> set[int]:
        """Return the blocks that the cache has, held or idle."""
        return set(self._remembered)

    def idle(self) -> set[int]:
        """Return the blocks that the cache has and nobody holds."""
        return {i for i, state in enumerate(self._states) if state is _State.CACHED}

    def check_integrity(self) -> None:
        """Recount everything; raises BlockPoolCorruptError where the books disagree."""
        if +self._counts != Counter(self._states):
            raise BlockPoolCorruptError(f"counts {self._counts} against {Counter(self._states)}")
        free = [i for i, state in enumerate(self._states) if state is _State.FREE]
        if [(run[0], len(run)) for run in _runs(free)] != self._extents.sorted():
            raise BlockPoolCorruptError("free extents do not match the free blocks")
        for i, state in enumerate(self._states):
            self._check_block(i, state)

    def _check_block(self, i: int, state: _State) -> None:
        owners, pins, remembered = self._owners[i], self._pins[i], i in self._remembered
        if state in _OWNED:
            agrees = owners > 0 and pins >= 0
        elif state is _State.QUARANTINED:
            agrees = owners == 0 and pins > 0
        else:
            agrees = owners == pins == 0 and remembered is (state is _State.CACHED)
        if not agrees:
            raise BlockPoolCorruptError(
                f"block {i} is {state.value}, with {owners} owners and {pins} pins, "
                f"and {'in the cache' if remembered else 'in no cache'}"
            )

    def _check(self, ids: Sequence[int], allowed: tuple[_State, ...], action: str) -> None:
        if len(set(ids)) != len(ids):
            raise BlockStateError(f"cannot {action} blocks: an id is given twice")
        for i in ids:
            if not 0 <= i < len(self._states):
                raise BlockStateError(f"cannot {action} block {i}: there is no such block")
            if self._states[i] not in allowed:
                raise BlockStateError(f"cannot {action} block {i}: it is {self._states[i].value}")

    def _check_remembered(self, ids: Sequence[int], expected: bool, action: str) -> None:
        for i in ids:
            if (i in self._remembered) is not expected:
                found = "is not" if expected else "is already"
                raise BlockStateError(f"cannot {action} block {i}: it {found} in the cache")

    def _settle(self, ids: Sequence[int]) -> None:
        """Put blocks that nobody owns any more where their pins and the cache want them."""
        self._move([i for i in ids if self._pins[i]], _State.QUARANTINED)
        unpinned = [i for i in ids if not self._pins[i]]
        self._free([i for i in unpinned if i not in self._remembered])
        idle = [i for i in unpinned if i in self._remembered]
        self._move(idle, _State.CACHED)
        if idle:
            assert self._cache is not None
            self._cache.idle(idle)

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
