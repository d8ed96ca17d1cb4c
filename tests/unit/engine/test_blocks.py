"""The block pool: two owners, contiguous extents, and books that always agree."""

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.blocks import BlockCounts, BlockPool
from engine.errors import BlockStateError, OutOfBlocks


def test_reservations_are_contiguous_while_an_extent_fits() -> None:
    pool = BlockPool(10)
    first, second, third = pool.reserve(3), pool.reserve(2), pool.reserve(4)
    assert (first, second, third) == ([0, 1, 2], [3, 4], [5, 6, 7, 8])
    pool.release(second)
    assert pool.reserve(1) == [9]  # the smallest extent that fits
    pool.release(first)
    assert pool.reserve(5) == [0, 1, 2, 3, 4]  # freed neighbours are one extent again


def test_fewest_extents_are_used_where_none_fits_alone() -> None:
    pool = BlockPool(12)
    pool.reserve(12)
    pool.release([0, 1, 2, 3])
    pool.release([6])
    pool.release([8, 9])
    assert pool.reserve(6) == [0, 1, 2, 3, 8, 9]


def test_refusal_says_how_many_are_free_and_takes_nothing() -> None:
    pool = BlockPool(4)
    pool.reserve(3)
    with pytest.raises(OutOfBlocks) as refused:
        pool.reserve(2)
    assert (refused.value.needed, refused.value.free) == (2, 1)
    assert pool.counts().free == 1


def test_released_but_pinned_blocks_are_quarantined_until_the_last_unpin() -> None:
    pool = BlockPool(4)
    ids = pool.reserve(3)
    pool.mark_used(ids)
    pool.pin(ids[:2])
    pool.pin(ids[:1])
    pool.release(ids)
    assert pool.counts() == BlockCounts(total=4, free=2, reserved=0, used=0, quarantined=2)
    pool.unpin(ids[:2])
    assert pool.counts().quarantined == 1
    with pytest.raises(OutOfBlocks):
        pool.reserve(4)
    pool.unpin(ids[:1])
    assert pool.counts().free == 4
    pool.check_integrity()


@pytest.mark.parametrize(
    ("call", "ids", "message"),
    [
        ("release", [0], "block 0: it is free"),
        ("pin", [0], "block 0: it is free"),
        ("mark_used", [0], "block 0: it is free"),
        ("unpin", [5], "block 5: it is not pinned"),
        ("unpin", [0], "block 0: it is free"),
        ("release", [5, 5], "given twice"),
        ("release", [8], "no such block"),
        ("pin", [-1], "no such block"),
        ("pin", [4], "block 4: it is quarantined"),
        ("release", [5, 4], "block 4: it is quarantined"),
    ],
)
def test_wrong_calls_are_refused_and_change_nothing(
    call: str, ids: list[int], message: str
) -> None:
    pool = BlockPool(8)
    pool.reserve(6)
    pool.release([0, 1])
    pool.pin([4])
    pool.release([4])
    before = pool.counts()
    with pytest.raises(BlockStateError, match=message):
        getattr(pool, call)(ids)
    assert pool.counts() == before
    pool.check_integrity()


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(1).reserve(0)


class PoolMachine(RuleBasedStateMachine):
    """Plays random calls against the simplest model of the pool there is."""

    sequences = Bundle("sequences")
    transfers = Bundle("transfers")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(24)
        self.owned: set[int] = set()
        self.used: set[int] = set()
        self.pins: dict[int, int] = {}

    @property
    def taken(self) -> set[int]:
        return self.owned | self.pins.keys()

    @rule(target=sequences, n=st.integers(1, 12))
    def reserve(self, n: int) -> list[int]:
        free = sorted(set(range(24)) - self.taken)
        if n > len(free):
            with pytest.raises(OutOfBlocks):
                self.pool.reserve(n)
            return []
        ids = self.pool.reserve(n)
        assert len(ids) == n
        assert set(ids) <= set(free)
        runs = {i: run for run in _runs(free) for i in run}
        if any(len(run) >= n for run in runs.values()):
            assert ids == list(range(ids[0], ids[0] + n))
        self.owned |= set(ids)
        return ids

    @rule(ids=sequences)
    def mark_used(self, ids: list[int]) -> None:
        if ids and set(ids) <= self.owned:
            self.pool.mark_used(ids)
            self.used |= set(ids)

    @rule(target=transfers, ids=sequences, data=st.data())
    def pin(self, ids: list[int], data: st.DataObject) -> list[int]:
        if not ids or not set(ids) <= self.owned:
            return []
        part = data.draw(st.lists(st.sampled_from(ids), unique=True))
        self.pool.pin(part)
        for i in part:
            self.pins[i] = self.pins.get(i, 0) + 1
        return part

    @rule(ids=consumes(transfers))
    def unpin(self, ids: list[int]) -> None:
        self.pool.unpin(ids)
        for i in ids:
            self.pins[i] -= 1
            if not self.pins[i]:
                del self.pins[i]

    @rule(ids=consumes(sequences))
    def release(self, ids: list[int]) -> None:
        self.pool.release(ids)
        self.owned -= set(ids)
        self.used -= set(ids)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity()
        assert self.pool.counts() == BlockCounts(
            total=24,
            free=24 - len(self.taken),
            reserved=len(self.owned - self.used),
            used=len(self.used),
            quarantined=len(self.pins.keys() - self.owned),
        )


def _runs(ids: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for i in ids:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("module", ["engine.blocks", "engine.stopping", "engine.config"])
def test_these_modules_load_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
