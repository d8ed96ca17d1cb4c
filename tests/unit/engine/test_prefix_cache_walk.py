"""The prefix cache under random sequences, against the simplest model of it there is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.blocks import BlockPool
from engine.errors import OutOfBlocks
from engine.prefix_cache import PrefixCache
from tests.unit.engine.prefix_keys import BLOCK_SIZE as SIZE
from tests.unit.engine.prefix_keys import KEYS, keys_of

Prefix = tuple[bytes, tuple[int, ...]]  # salt, all tokens up to a block's end


@dataclass(eq=False)
class _Sequence:
    salt: bytes
    tokens: list[int]
    ids: list[int]
    owned: bool = True
    pins: list[list[int]] = field(default_factory=list)


class CacheMachine(RuleBasedStateMachine):
    """Plays sequences against a dict of token tuples, and works out naively what must go.

    `content` is what was last written to each block, so that a block handed out twice, or found
    under other tokens, shows.
    """

    TOTAL = 8

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.TOTAL)
        self.inserted: list[bytes] = []
        self.evicted: list[bytes] = []
        self.followed: set[bytes] = set()
        self.cache = PrefixCache(
            self.pool,
            block_size=SIZE,
            keys=KEYS,
            on_insert=self.insert,
            on_evict=self.evict,
        )
        self.live: list[_Sequence] = []
        self.content: dict[int, Prefix] = {}
        self.cached: dict[Prefix, int] = {}
        self.last_used: dict[Prefix, int] = {}
        self.clock = 0

    # Who follows the changes has what the cache has; a key is not stored or removed twice.

    def insert(self, keys: Sequence[bytes]) -> None:
        assert not self.followed & set(keys)
        self.followed |= set(keys)
        self.inserted.extend(keys)

    def evict(self, keys: Sequence[bytes]) -> None:
        assert self.followed >= set(keys)
        self.followed -= set(keys)
        self.evicted.extend(keys)

    # What the model knows.

    @property
    def owned(self) -> set[int]:
        return {i for s in self.live if s.owned for i in s.ids}

    @property
    def held(self) -> set[int]:
        return self.owned | {i for s in self.live for pin in s.pins for i in pin}

    @property
    def idle(self) -> dict[Prefix, int]:
        held = self.held
        return {prefix: i for prefix, i in self.cached.items() if i not in held}

    def known(self, tokens: Sequence[int], salt: bytes, blocks: int) -> list[int]:
        ids = []
        for n in range(1, blocks + 1):
            block = self.cached.get((salt, tuple(tokens[: n * SIZE])))
            if block is None:
                break
            ids.append(block)
        return ids

    def give_up(self, n: int, sharing: Sequence[int] = ()) -> list[dict[bytes, int]]:
        """Drop `n` idle prefixes from the model, as the rules say, each with all below it.

        Returns their keys and lengths in order.
        """
        given_up = []
        for _ in range(n):
            idle = [p for p, i in self.idle.items() if i not in sharing]
            leaves = [p for p in idle if len(self.below(p)) == 1]
            victim = min(leaves or idle, key=lambda p: (self.last_used[p], -len(p[1])))
            below = self.below(victim)
            given_up.append({keys_of(p[1], p[0])[-1]: len(p[1]) for p in below})
            for prefix in below:
                del self.cached[prefix]
        return given_up

    def check_evicted(self, expected: list[dict[bytes, int]]) -> None:
        """One victim after the other, children before their parents; siblings in any order."""
        said = iter(self.told(self.evicted))
        for victims in expected:
            keys = list(islice(said, len(victims)))
            assert set(keys) == victims.keys()
            lengths = [victims[key] for key in keys]
            assert lengths == sorted(lengths, reverse=True)
        assert not list(said)

    def below(self, prefix: Prefix) -> list[Prefix]:
        salt, tokens = prefix
        return [p for p in self.cached if p[0] == salt and p[1][: len(tokens)] == tokens]

    def note_idle(self, before: set[int]) -> None:
        """A sequence let go of blocks: they, and idle ones above them, were used just now."""
        self.clock += 1
        let_go = before - self.held
        for low in [p for p, i in self.cached.items() if i in let_go]:
            for prefix in self.idle:
                if low in self.below(prefix):
                    self.last_used[prefix] = self.clock

    # What may happen.

    @rule(
        # Mostly one prompt at several lengths: the same blocks are then often computed twice.
        tokens=st.builds(
            lambda length, end: [0] * length + end,
            st.integers(1, 7),
            st.lists(st.integers(0, 1), max_size=2),
        ),
        salt=st.sampled_from([b"a", b"a", b"b"]),
        more=st.integers(0, 2),
        used=st.booleans(),
    )
    def start(self, tokens: list[int], salt: bytes, more: int, used: bool) -> None:
        num_blocks = -(-len(tokens) // SIZE) + more
        shared = self.known(tokens, salt, (len(tokens) - 1) // SIZE)
        assert self.cache.match(tokens, salt) == shared
        assert all(
            self.content[i] == (salt, tuple(tokens[: (n + 1) * SIZE])) for n, i in enumerate(shared)
        )
        free = self.TOTAL - len(self.held) - len(self.idle)
        idle = set(self.idle.values()) - set(shared)
        fresh = num_blocks - len(shared)
        if fresh > free + len(idle):
            with pytest.raises(OutOfBlocks):
                self.cache.acquire(tokens, salt, num_blocks)
            return
        expected = self.give_up(max(0, fresh - free), shared)
        untouchable = self.held | set(self.cached.values())
        acquired = self.cache.acquire(tokens, salt, num_blocks)
        assert acquired.blocks[: acquired.shared] == shared
        assert (acquired.tokens, len(acquired.blocks)) == (len(shared) * SIZE, num_blocks)
        assert not set(acquired.blocks[acquired.shared :]) & untouchable
        self.check_evicted(expected)
        for i in acquired.blocks[acquired.shared :]:
            self.content.pop(i, None)
        if used:
            self.pool.mark_used(acquired.blocks)
        self.live.append(_Sequence(salt, tokens, acquired.blocks))

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def press(self, data: st.DataObject) -> None:
        free = self.TOTAL - len(self.held) - len(self.idle)
        n = data.draw(st.integers(free + 1, free + len(self.idle)))
        expected = self.give_up(n - free)
        untouchable = self.held | set(self.cached.values())
        ids = self.pool.reserve(n)
        assert len(set(ids) - untouchable) == n
        self.check_evicted(expected)
        self.pool.release(ids)

    @precondition(lambda self: any(s.owned for s in self.live))
    @rule(data=st.data(), grown=st.lists(st.integers(0, 1), max_size=3))
    def compute(self, data: st.DataObject, grown: list[int]) -> None:
        sequence = data.draw(st.sampled_from([s for s in self.live if s.owned]))
        room = len(sequence.ids) * SIZE - len(sequence.tokens)
        sequence.tokens = sequence.tokens + grown[:room]
        upto = data.draw(st.integers(0, len(sequence.tokens)) | st.just(len(sequence.tokens)))
        tokens = sequence.tokens[:upto]
        full = upto // SIZE
        known = self.known(tokens, sequence.salt, full)
        new = sequence.ids[len(known) : full]
        assert self.cache.insert(tokens, sequence.salt, sequence.ids) == new
        for n in range(full):
            prefix = (sequence.salt, tuple(tokens[: (n + 1) * SIZE]))
            self.content[sequence.ids[n]] = prefix
            self.cached.setdefault(prefix, sequence.ids[n])
        assert self.told(self.inserted) == keys_of(tokens, sequence.salt)[len(known) : full]

    @precondition(lambda self: any(s.owned for s in self.live))
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from([s for s in self.live if s.owned]))
        part = data.draw(st.lists(st.sampled_from(sequence.ids), unique=True, min_size=1))
        self.pool.pin(part)
        sequence.pins.append(part)

    @precondition(lambda self: any(s.pins for s in self.live))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from([s for s in self.live if s.pins]))
        before = self.held
        self.pool.unpin(sequence.pins.pop())
        self.end(sequence, before)

    @precondition(lambda self: any(s.owned for s in self.live))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from([s for s in self.live if s.owned]))
        before = self.held
        self.pool.release(sequence.ids)
        sequence.owned = False
        self.end(sequence, before)

    def end(self, sequence: _Sequence, before: set[int]) -> None:
        if not sequence.owned and not sequence.pins:
            self.live.remove(sequence)
        self.note_idle(before)

    def told(self, keys: list[bytes]) -> list[bytes]:
        said = list(keys)
        keys.clear()
        return said

    @invariant()
    def books_agree(self) -> None:
        self.cache.check_integrity()
        counts = self.pool.counts()
        assert counts.free + counts.cached == counts.available == self.TOTAL - len(self.held)
        assert counts.cached == len(self.idle)
        assert counts.reserved + counts.used == len(self.owned)
        assert counts.quarantined == len(self.held - self.owned)
        assert counts.total == self.TOTAL
        assert self.pool.remembered() == set(self.cached.values())
        assert self.followed == {keys_of(tokens, salt)[-1] for salt, tokens in self.cached}
        assert not self.inserted
        assert not self.evicted


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
