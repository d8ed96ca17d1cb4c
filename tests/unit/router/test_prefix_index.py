"""What the router knows of prefix caches: lookups, gaps, bounds, and instances that come and go."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from twinpool.v1 import worker_pb2

from router.hello import prefix_events_from_wire
from router.ledger import CachedTokens, InstanceKey
from router.membership import Instance
from router.prefix_index import PrefixEvents, PrefixIndex
from service.prefix_keys import PrefixKeys, prefix_salt, short_key
from tests.unit.router.test_membership import instance
from tests.unit.router.test_workers import request

SEED = b"seed"
BLOCK = 4
KEY = InstanceKey("holder", 1)
PROMPT = tuple(range(10))


def holder(name: str = "holder", *, cp: int = 1, blocks: int = 64, seed: bytes = SEED) -> Instance:
    made = instance(name=name, epoch=1)
    return replace(
        made,
        layout=replace(made.layout, cp=cp),
        capacity=replace(made.capacity, blocks=blocks, block_size=BLOCK),
        prefix_seed=seed,
    )


def received(events: worker_pb2.PrefixEvents) -> PrefixEvents:
    """A message that has been over the wire."""
    message = worker_pb2.PrefixEvents.FromString(events.SerializeToString())
    return prefix_events_from_wire(message)


def keys_of(*tokens: int, salt: bytes = b"", first: int = 0, seed: bytes = SEED) -> list[int]:
    """Short keys of a prompt's full blocks."""
    keys = PrefixKeys(seed=seed)
    above, short = keys.root(prefix_salt(first, salt)), []
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        above = keys.block(above, keys.piece(tokens[start : start + BLOCK]))
        short.append(short_key(above))
    return short


def told(*stored: int, removed: tuple[int, ...] = (), sequence: int = 1) -> PrefixEvents:
    return PrefixEvents(sequence=sequence, reset=sequence == 1, stored=stored, removed=removed)


def knowing(*stored: int) -> PrefixIndex:
    index = PrefixIndex()
    index.join(holder())
    assert index.take(KEY, told(*stored))
    return index


def test_longest_chain_from_the_first_token_on_counts() -> None:
    first, second = keys_of(*PROMPT)
    assert knowing().lookup(request(*PROMPT))(KEY) == 0
    assert knowing(first).lookup(request(*PROMPT))(KEY) == BLOCK
    assert knowing(first, second).lookup(request(*PROMPT))(KEY) == 2 * BLOCK
    assert knowing(second).lookup(request(*PROMPT))(KEY) == 0
    assert knowing(first, second).lookup(request(9, *PROMPT))(KEY) == 0


def test_last_token_is_always_computed() -> None:
    index = knowing(*keys_of(*PROMPT))
    assert index.lookup(request(*PROMPT[:8]))(KEY) == BLOCK
    assert index.lookup(request(*PROMPT[:9]))(KEY) == 2 * BLOCK
    assert index.lookup(request(*PROMPT[:4]))(KEY) == 0
    assert index.lookup(request(1))(KEY) == 0


def test_salts_are_kept_apart() -> None:
    index = knowing(*keys_of(*PROMPT, salt=b"mine"))
    assert index.lookup(request(*PROMPT, salt="mine"))(KEY) == 2 * BLOCK
    assert index.lookup(request(*PROMPT, salt="yours"))(KEY) == 0
    assert index.lookup(request(*PROMPT))(KEY) == 0


def test_each_instance_is_asked_by_its_own_names() -> None:
    """Another layout, another model's seed: the same prompt has other keys there."""
    index = PrefixIndex()
    wide, other = InstanceKey("wide", 1), InstanceKey("other", 1)
    index.join(holder())
    index.join(holder("wide", cp=4))
    index.join(holder("other", seed=b"other"))
    plain = keys_of(*PROMPT)
    # One of the ranks, which the prompt's beginning decides on.
    spread = [key for rank in range(4) for key in keys_of(*PROMPT, first=rank)[:1]]
    for key, stored in ((KEY, plain), (wide, spread), (other, keys_of(*PROMPT, seed=b"other"))):
        assert index.take(key, told(*stored))
    cached = index.lookup(request(*PROMPT))
    assert [cached(key) for key in (KEY, wide, other)] == [2 * BLOCK, BLOCK, 2 * BLOCK]


def test_lookup_made_before_the_news_knows_them() -> None:
    index = knowing()
    cached = index.lookup(request(*PROMPT))
    first, second = keys_of(*PROMPT)
    index.take(KEY, told(first, second, sequence=2))
    assert cached(KEY) == 2 * BLOCK
    index.take(KEY, told(removed=(second,), sequence=3))
    assert cached(KEY) == BLOCK


def test_reset_forgets_what_was_said_before() -> None:
    first, second = keys_of(*PROMPT)
    index = knowing(first, second)
    assert index.take(KEY, told(first))
    assert index.known_blocks(KEY) == 1


def test_gap_forgets_everything_until_the_next_reset() -> None:
    index = knowing(1, 2, 3)
    assert not index.take(KEY, told(4, sequence=3))
    assert index.known_blocks(KEY) == 0
    assert not index.take(KEY, told(5, sequence=4))
    assert index.known_blocks(KEY) == 0
    assert index.take(KEY, told(6))
    assert index.take(KEY, told(7, sequence=2))
    assert index.keys(KEY) == {6, 7}


def test_instance_that_leaves_is_forgotten() -> None:
    index = knowing(*keys_of(*PROMPT))
    cached = index.lookup(request(*PROMPT))
    index.leave(KEY)
    index.leave(KEY)
    assert cached(KEY) == index.known_blocks(KEY) == 0
    assert index.take(KEY, told(1))
    index.join(holder())
    assert cached(KEY) == 0


def test_instance_that_tells_of_no_cache_has_none() -> None:
    index = PrefixIndex()
    index.join(holder(seed=b""))
    index.take(KEY, told(*keys_of(*PROMPT, seed=b"")))
    assert index.lookup(request(*PROMPT))(KEY) == 0


def test_no_more_is_remembered_than_the_instance_has_blocks() -> None:
    for index, most in ((PrefixIndex(), 3), (PrefixIndex(max_keys=2), 2)):
        index.join(holder(blocks=3))
        index.take(KEY, told(*range(100)))
        assert index.known_blocks(KEY) == most
        index.take(KEY, told(*range(100, 200), sequence=2))
        assert index.known_blocks(KEY) == most


def found_at_once(cached: CachedTokens) -> dict[InstanceKey, list[int]]:
    everywhere = cached.everywhere()
    assert everywhere is not None
    return {key: [*of_ranks] for key, of_ranks in everywhere.items()}


def test_all_that_have_anything_of_a_prompt_are_found_at_once() -> None:
    first, second = keys_of(*PROMPT)
    [elsewhere] = keys_of(*PROMPT[:BLOCK], first=1)
    index = PrefixIndex()
    stored = {
        "both": (first, second),
        "one": (first,),
        "tail": (second,),
        "other dp rank": (elsewhere,),
        "none": (),
    }
    for name, keys in stored.items():
        made = holder(name)
        index.join(replace(made, capacity=replace(made.capacity, dp=2)))
        assert index.take(InstanceKey(name, 1), told(*keys))
    cached = index.lookup(request(*PROMPT))
    found = {key.name: of_ranks for key, of_ranks in found_at_once(cached).items()}
    assert found == {"both": [2 * BLOCK, 0], "one": [BLOCK, 0], "other dp rank": [0, BLOCK]}
    for name in stored:
        key = InstanceKey(name, 1)
        assert [cached(key), cached(key, 1)] == found.get(name, [0, 0])
    assert index.lookup(request(1)).everywhere() == {}


class PrefixIndexWalk(RuleBasedStateMachine):
    """Instances come, tell, forget and go; asking for all finds what asking for each does."""

    PROMPTS = (tuple(range(18)), (*range(8), *range(50, 62)), (7, 7, 7, 7, 7, 7, 7, 7, 7))

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.known: dict[InstanceKey, tuple[int, set[int]]] = {}
        self.keys = [keys_of(*prompt) for prompt in self.PROMPTS]

    @rule(number=st.integers(0, 5), seed=st.sampled_from([SEED, b"other"]))
    def joins(self, number: int, seed: bytes) -> None:
        made = holder(f"i{number}", seed=seed)
        self.index.join(made)
        self.known[made.key] = (0, set())

    @rule(number=st.integers(0, 5))
    def leaves(self, number: int) -> None:
        key = InstanceKey(f"i{number}", 1)
        self.index.leave(key)
        self.known.pop(key, None)

    @rule(
        number=st.integers(0, 5),
        prompt=st.integers(0, 2),
        blocks=st.integers(0, 4),
        removed=st.integers(0, 4),
    )
    def tells(self, number: int, prompt: int, blocks: int, removed: int) -> None:
        key = InstanceKey(f"i{number}", 1)
        if key not in self.known:
            return
        sequence, keys = self.known[key]
        gone, come = self.keys[prompt][:removed], self.keys[prompt][:blocks]
        events = PrefixEvents(sequence=sequence + 1, reset=sequence == 0, stored=come, removed=gone)
        assert self.index.take(key, events)
        self.known[key] = sequence + 1, keys.difference(gone) | {*come}

    @rule(number=st.integers(0, 5))
    def loses_a_message(self, number: int) -> None:
        key = InstanceKey(f"i{number}", 1)
        if key in self.known and self.known[key][0]:
            events = PrefixEvents(sequence=99_999, reset=False, stored=(), removed=())
            assert not self.index.take(key, events)
            self.known[key] = 0, set()

    @invariant()
    def both_ways_agree(self) -> None:
        for key, (_, keys) in self.known.items():
            assert self.index.keys(key) == keys
        for prompt in self.PROMPTS:
            cached = self.index.lookup(request(*prompt))
            asked = {key: [tokens] for key in self.known if (tokens := cached(key))}
            assert found_at_once(cached) == asked


TestPrefixIndexWalk: Any = PrefixIndexWalk.TestCase
