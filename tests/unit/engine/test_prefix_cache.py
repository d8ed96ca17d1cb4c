"""The prefix cache: what is found, who shares it, what goes first, and books that always agree."""

import subprocess
import sys
from collections.abc import Sequence
from hashlib import blake2b

import pytest

from engine.blocks import BlockCounts, BlockPool
from engine.errors import BlockStateError, OutOfBlocks
from engine.prefix_cache import Keys, PrefixCache
from service.prefix_keys import KEY_BYTES, PrefixKeys
from tests.unit.engine.prefix_keys import BLOCK_SIZE as SIZE
from tests.unit.engine.prefix_keys import KEYS, keys_of

SALT = b"tenant"


def make(blocks: int = 8, keys: Keys = KEYS) -> tuple[BlockPool, PrefixCache]:
    pool = BlockPool(blocks)
    return pool, PrefixCache(pool, block_size=SIZE, keys=keys)


def run(
    pool: BlockPool, cache: PrefixCache, tokens: Sequence[int], salt: bytes = SALT
) -> list[int]:
    """Take in and release a prompt, as if it had been computed; returns its blocks."""
    acquired = cache.acquire(tokens, salt, -(-len(tokens) // SIZE))
    cache.insert(tokens, salt, acquired.blocks)
    pool.release(acquired.blocks)
    return acquired.blocks


# ---- finding


def test_longest_known_beginning_is_found() -> None:
    pool, cache = make()
    ids = run(pool, cache, [1, 2, 3, 4, 5])
    assert cache.match([1, 2, 3, 4, 9, 9, 9], SALT) == ids[:2]
    assert cache.match([1, 2, 9, 9, 5], SALT) == ids[:1]
    assert cache.match([9, 9, 3, 4, 5], SALT) == []  # the same block after other tokens
    assert pool.counts() == BlockCounts(
        total=8, free=6, reserved=0, used=0, quarantined=0, cached=2
    )


@pytest.mark.parametrize(("length", "found"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
def test_at_least_one_token_is_left_to_compute(length: int, found: int) -> None:
    pool, cache = make()
    run(pool, cache, [1, 2, 3, 4])
    assert len(cache.match([1, 2, 3, 4, 5][:length], SALT)) == found


def test_tenants_never_share() -> None:
    pool, cache = make()
    ids = run(pool, cache, [1, 2, 3], b"a")
    assert cache.match([1, 2, 3], b"b") == []
    assert run(pool, cache, [1, 2, 3], b"b")[0] != ids[0]
    assert cache.match([1, 2, 3], b"a") == ids[:1]


def test_keys_are_the_same_in_every_process_and_differ_by_what_they_stand_for() -> None:
    root = KEYS.root(b"tenant")
    assert (
        root
        == blake2b(b"\5\0\0\0\0\0\0\0modeltenant", digest_size=16, person=b"prefix root").digest()
    )
    pool = BlockPool(8)
    inserted: list[bytes] = []
    cache = PrefixCache(pool, block_size=SIZE, keys=KEYS, on_insert=inserted.extend)
    run(pool, cache, [1, 2, 1, 2], b"tenant")
    first = KEYS.block(root, b"\1\0\0\0\2\0\0\0")
    assert inserted == [first, KEYS.block(first, b"\1\0\0\0\2\0\0\0")]
    others = {root, first}
    others |= {PrefixKeys(seed=b"mode").root(b"ltenant"), PrefixKeys(seed=b"other").root(b"tenant")}
    assert len(others) == 4
    assert {len(key) for key in others} == {KEY_BYTES}


class AllTheSame(PrefixKeys):
    """Names all blocks alike."""

    def block(self, above: bytes, piece: bytes) -> bytes:
        return b"the same" * 2


def test_equal_keys_of_other_tokens_are_not_believed() -> None:
    same = AllTheSame(seed=b"model")
    pool, cache = make(keys=same)
    ids = run(pool, cache, [1, 2, 3])
    assert cache.match([1, 2, 9], SALT) == ids[:1]
    assert cache.match([3, 4, 9], SALT) == []
    assert cache.match([1, 2, 9], b"other") == []
    assert cache.match([1, 2, 1, 2, 9], SALT) == ids[:1]
    run(pool, cache, [3, 4, 5])
    run(pool, cache, [5, 6, 5, 6, 7], b"other")
    assert cache.match([1, 2, 9], SALT) == ids[:1]
    assert pool.counts().cached == 1
    pool, cache = make(keys=same)
    run(pool, cache, [5, 6, 7, 8, 9])  # both of its blocks have one key
    assert pool.counts().cached == 1
    cache.check_integrity()


# ---- sharing


def test_several_sequences_hold_a_block_until_the_last_one_ends() -> None:
    pool, cache = make()
    first = cache.acquire([1, 2, 3, 4, 5], SALT, 3)
    assert (first.shared, first.tokens) == (0, 0)
    assert cache.insert([1, 2, 3, 4, 5], SALT, first.blocks) == first.blocks[:2]
    second = cache.acquire([1, 2, 3, 4, 6], SALT, 4)
    assert (second.shared, second.tokens, len(second.blocks)) == (2, 4, 4)
    assert second.blocks[:2] == first.blocks[:2]
    pool.release(first.blocks)
    assert pool.counts().cached == 0
    with pytest.raises(OutOfBlocks):
        pool.reserve(5)
    pool.release(second.blocks)
    assert (pool.counts().cached, pool.counts().free) == (2, 6)
    cache.check_integrity()


def test_second_copy_of_a_block_stays_private_and_is_freed_at_its_end() -> None:
    pool, cache = make()
    first, second = cache.acquire([1, 2, 3], SALT, 2), cache.acquire([1, 2, 3, 4, 5], SALT, 3)
    assert cache.insert([1, 2, 3], SALT, first.blocks) == first.blocks[:1]
    assert cache.insert([1, 2, 3, 4, 5], SALT, second.blocks) == second.blocks[1:2]
    assert cache.match([1, 2, 3, 4, 5], SALT) == [first.blocks[0], second.blocks[1]]
    pool.release(second.blocks)
    assert (pool.counts().cached, pool.counts().free) == (1, 5)
    pool.release(first.blocks)
    assert (pool.counts().cached, pool.counts().free) == (2, 6)
    cache.check_integrity()


def test_blocks_are_taken_in_as_they_are_computed() -> None:
    _, cache = make()
    tokens = [1, 2, 3, 4, 5, 6, 7]
    blocks = cache.acquire(tokens, SALT, 4).blocks
    assert cache.insert(tokens[:1], SALT, blocks) == []
    assert cache.insert(tokens[:3], SALT, blocks) == blocks[:1]
    assert cache.insert(tokens[:6], SALT, blocks) == blocks[1:3]
    assert cache.insert(tokens, SALT, blocks) == []
    assert cache.insert([*tokens, 8, 9, 10], SALT, blocks) == blocks[3:]


def test_known_blocks_are_not_hashed_again() -> None:
    hashed: list[bytes] = []

    class Counted(PrefixKeys):
        def block(self, above: bytes, piece: bytes) -> bytes:
            hashed.append(piece)
            return super().block(above, piece)

    _, cache = make(keys=Counted(seed=b"model"))
    blocks = cache.acquire([1, 2, 3, 4, 5, 6], SALT, 3).blocks
    cache.insert([1, 2, 3, 4], SALT, blocks)
    hashed.clear()
    cache.insert([1, 2, 3, 4, 5, 6], SALT, blocks)
    assert set(hashed) == {b"\5\0\0\0\6\0\0\0"}


def test_released_block_that_is_read_stays_findable_and_is_not_given_up() -> None:
    pool, cache = make(3)
    blocks = cache.acquire([1, 2, 3], SALT, 2).blocks
    cache.insert([1, 2, 3], SALT, blocks)
    pool.pin(blocks)
    pool.release(blocks)
    assert (pool.counts().quarantined, pool.counts().cached) == (2, 0)
    with pytest.raises(OutOfBlocks):
        pool.reserve(2)
    again = cache.acquire([1, 2, 9], SALT, 2)
    assert again.blocks[0] == blocks[0]
    pool.release(again.blocks)
    pool.unpin(blocks)
    assert (pool.counts().quarantined, pool.counts().cached) == (0, 1)
    assert len(pool.reserve(3)) == 3
    cache.check_integrity()


# ---- giving up


def test_least_recently_used_go_first_and_children_before_parents() -> None:
    pool = BlockPool(6)
    evicted: list[bytes] = []
    cache = PrefixCache(pool, block_size=SIZE, keys=KEYS, on_evict=evicted.extend)
    old, new = [1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6]
    run(pool, cache, old)
    run(pool, cache, new)
    run(pool, cache, [1, 1, 2, 2, 9])  # the old one's first two are in use again
    keys = keys_of(old, SALT)
    pool.release(pool.reserve(2))
    assert evicted == [keys[2], keys_of(new, SALT)[2]]
    pool.reserve(6)
    assert evicted[2:] == [*reversed(keys_of(new, SALT)[:2]), *reversed(keys[:2])]
    assert len(cache) == 0


def test_parent_used_by_others_outlives_its_children() -> None:
    pool, cache = make(8)
    run(pool, cache, [1, 1, 2, 2])
    run(pool, cache, [7, 7, 8, 8])
    run(pool, cache, [1, 1, 3])
    held = pool.reserve(4 + 3)
    assert cache.match([1, 1, 0], SALT) != []
    assert cache.match([7, 7, 0], SALT) == []
    pool.release(held)


def test_no_more_is_given_up_than_is_missing() -> None:
    pool, cache = make(4)
    run(pool, cache, [1, 1, 2, 2])
    pool.reserve(3)
    assert pool.counts().cached == 1
    assert len(cache.match([1, 1, 2, 2, 3], SALT)) == 1


def test_refused_acquire_takes_and_gives_up_nothing() -> None:
    pool, cache = make(4)
    run(pool, cache, [1, 1, 2, 2])
    pool.reserve(1)
    before = pool.counts()
    with pytest.raises(OutOfBlocks) as refused:
        cache.acquire([1, 1, 2, 2, 3], SALT, 4)  # both idle blocks are its own beginning
    assert (refused.value.needed, refused.value.free) == (2, 1)
    assert pool.counts() == before
    assert len(cache) == 2
    assert len(cache.acquire([1, 1, 2, 2, 3], SALT, 3).blocks) == 3


def test_parent_that_was_idle_before_its_child_still_goes_after_it() -> None:
    pool, cache = make(4)
    first, second = cache.acquire([1, 1, 0], SALT, 2), cache.acquire([1, 1, 2, 2], SALT, 2)
    cache.insert([1, 1], SALT, first.blocks)
    cache.insert([1, 1, 2, 2], SALT, second.blocks)
    pool.release(first.blocks)
    pool.release(second.blocks)
    cache.check_integrity()
    pool.reserve(3)
    assert cache.match([1, 1, 2, 2, 0], SALT) == first.blocks[:1]


def test_idle_parent_of_a_held_block_goes_last_and_takes_it_out_of_the_cache() -> None:
    pool, evicted = BlockPool(6), list[bytes]()
    cache = PrefixCache(pool, block_size=SIZE, keys=KEYS, on_evict=evicted.extend)
    first, second = cache.acquire([1, 1, 0], SALT, 2), cache.acquire([1, 1, 2, 2], SALT, 2)
    cache.insert([1, 1], SALT, first.blocks)
    cache.insert([1, 1, 2, 2], SALT, second.blocks)
    pool.release(first.blocks)  # idle, but the parent of a block that the second one holds
    run(pool, cache, [5, 5])
    rest = pool.reserve(3)
    assert cache.match([5, 5, 0], SALT) == []
    assert len(cache.match([1, 1, 2, 2, 0], SALT)) == 2
    rest += pool.reserve(1)
    assert first.blocks[0] in rest
    assert len(cache) == 0
    assert evicted[1:] == keys_of([1, 1, 2, 2], SALT)[::-1]
    cache.check_integrity()
    pool.release(second.blocks)
    assert pool.counts().free == 2
    pool.release(rest)
    assert pool.counts().free == 6


def test_block_that_left_the_cache_is_free_only_when_nobody_reads_it() -> None:
    pool, cache = make(3)
    first, second = cache.acquire([1], SALT, 1), cache.acquire([1, 1, 2, 2], SALT, 2)
    cache.insert([1, 1], SALT, first.blocks)
    cache.insert([1, 1, 2, 2], SALT, second.blocks)
    pool.pin(second.blocks[1:])
    pool.release(first.blocks)
    pool.release(second.blocks)
    pool.reserve(2)  # its idle parent goes, and it with it
    assert len(cache) == 0
    assert (pool.counts().free, pool.counts().quarantined) == (0, 1)
    cache.check_integrity()
    pool.unpin(second.blocks[1:])
    assert pool.counts().free == 1


# ---- wrong calls


def test_wrong_calls_are_refused_and_change_nothing() -> None:
    pool, cache = make(4)
    blocks = cache.acquire([1, 2, 3], SALT, 2).blocks
    cache.insert([1, 2], SALT, blocks)
    before = pool.counts()
    with pytest.raises(BlockStateError, match="already in the cache"):
        cache.insert([5, 6], SALT, blocks)
    with pytest.raises(BlockStateError, match="block 3: it is free"):
        cache.insert([5, 6, 7, 8], SALT, [blocks[1], 3])
    with pytest.raises(BlockStateError, match="given twice"):
        cache.insert([5, 6, 7, 8], SALT, [blocks[1], blocks[1]])
    with pytest.raises(BlockStateError, match="is not in the cache"):
        pool.share([blocks[1]])
    with pytest.raises(BlockStateError, match="is not in the cache"):
        pool.forget([blocks[1]])
    with pytest.raises(ValueError, match="token ids"):
        cache.match([-1, 2, 3], SALT)
    for tokens, num_blocks in (([], 1), ([1, 2, 3], 1)):
        with pytest.raises(ValueError, match="at least one token"):
            cache.acquire(tokens, SALT, num_blocks)
    with pytest.raises(ValueError, match="cache already"):
        PrefixCache(pool, block_size=SIZE, keys=KEYS)
    with pytest.raises(ValueError, match="block_size"):
        PrefixCache(BlockPool(1), block_size=0, keys=KEYS)
    with pytest.raises(BlockStateError, match="no cache"):
        BlockPool(1).remember([])
    assert pool.counts() == before
    assert len(cache) == 1
    cache.check_integrity()


def test_cache_loads_without_torch() -> None:
    code = "import sys, engine.prefix_cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
