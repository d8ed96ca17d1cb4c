"""Owns what the router knows of the instances' prefix caches, and how it looks a prompt up there.

A hint for placement and nothing more: it lags the caches by a moment, and its keys are shortened. A
wrong guess costs a miss. No clock and no stream of its own; bounded for each instance.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile

from router.ledger import CachedTokens, InstanceKey
from router.membership import Instance
from router.request import ValidRequest
from router.workers import cp_first
from service.prefix_keys import PrefixKeys, prefix_salt, short_key

# Beyond the blocks of any instance; a key takes about 200 bytes here.
MAX_KEYS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PrefixEvents:
    """What has changed in an instance's cache, as in `worker.proto`."""

    sequence: int
    reset: bool
    stored: Sequence[int]
    removed: Sequence[int]


class _Alike:
    """Instances that name a prompt's blocks alike, on as many dp ranks; which has which block.

    Each has a bit, and each block the bits of those that have it: to look at one block is to look
    at all of them. There may be hundreds.
    """

    def __init__(self, example: Instance) -> None:
        self.example = example
        # By bit; None: nobody's.
        self._members: list[InstanceKey | None] = []
        self._holding: dict[int, int] = {}

    def join(self, key: InstanceKey) -> int:
        """Returns the bit of a new member."""
        if None not in self._members:
            self._members.append(None)
        place = self._members.index(None)
        self._members[place] = key
        return 1 << place

    def leave(self, bit: int) -> None:
        """Gives back the bit of a member that has no blocks any more."""
        self._members[bit.bit_length() - 1] = None

    @property
    def is_empty(self) -> bool:
        return not any(self._members)

    def add(self, bit: int, keys: Iterable[int]) -> None:
        """A member has blocks by these short keys."""
        holding = self._holding
        for short in keys:
            holding[short] = holding.get(short, 0) | bit

    def drop(self, bit: int, keys: Iterable[int]) -> None:
        """A member has blocks no more that it had."""
        holding = self._holding
        for short in keys:
            if left := holding[short] & ~bit:
                holding[short] = left
            else:
                del holding[short]

    def beginnings(self, chain: "_Chain") -> Iterator[tuple[InstanceKey, int]]:
        """Yields each member that has a prompt's first blocks, and how many of them."""
        if not self._holding:
            return
        blocks, having = 0, (1 << len(self._members)) - 1
        for short in chain:
            still = having & self._holding.get(short, 0)
            if blocks and still != having:
                yield from self._named(having & ~still, blocks)
            having = still
            if not having:
                return
            blocks += 1
        if blocks:
            yield from self._named(having, blocks)

    def _named(self, bits: int, blocks: int) -> Iterator[tuple[InstanceKey, int]]:
        while bits:
            lowest = bits & -bits
            key = self._members[lowest.bit_length() - 1]
            assert key is not None
            yield key, blocks
            bits ^= lowest


@dataclass(kw_only=True)
class _Known:
    """What one instance has told. `sequence` is None while a reset is awaited."""

    most_keys: int
    alike: _Alike
    bit: int
    sequence: int | None = None
    keys: set[int] = field(default_factory=set)

    def store(self, keys: Iterable[int]) -> None:
        """Takes in what the instance has; no honest one has more blocks than it said."""
        some = [*islice(keys, max(0, self.most_keys - len(self.keys)))]
        self.alike.add(self.bit, some)
        self.keys.update(some)

    def remove(self, keys: Iterable[int]) -> None:
        """Forgets some of it; what is not known is no error."""
        gone = self.keys.intersection(keys)
        self.alike.drop(self.bit, gone)
        self.keys -= gone

    def clear(self) -> None:
        """Forgets all of it."""
        self.remove(self.keys)


class PrefixIndex:
    """Which blocks of prompts each instance has, whatever its role."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        """`max_keys` is what is remembered of one instance at most."""
        self._max_keys = max_keys
        self._known: dict[InstanceKey, _Known] = {}
        # By all that says how a block is named: seed, cp ranks, tokens, dp ranks.
        self._alike: dict[tuple[bytes, int, int, int], _Alike] = {}

    def join(self, instance: Instance) -> None:
        """Takes an instance in, of which nothing is known yet; one without a seed never tells."""
        self.leave(instance.key)
        if instance.prefix_seed:
            most = min(instance.capacity.blocks, self._max_keys)
            alike = self._alike.setdefault(_naming(instance), _Alike(instance))
            bit = alike.join(instance.key)
            self._known[instance.key] = _Known(most_keys=most, alike=alike, bit=bit)

    def leave(self, key: InstanceKey) -> None:
        """Forgets an instance; unknown ones are no error."""
        known = self._known.pop(key, None)
        if known is not None:
            known.clear()
            known.alike.leave(known.bit)
            if known.alike.is_empty:
                del self._alike[_naming(known.alike.example)]

    def take(self, key: InstanceKey, events: PrefixEvents) -> bool:
        """Takes in what an instance tells; False where messages before it are missing.

        All that was known of the instance is forgotten then, until it tells everything again.
        """
        known = self._known.get(key)
        if known is None:
            return True
        if events.reset:
            known.clear()
        elif known.sequence is None or events.sequence != known.sequence + 1:
            known.clear()
            known.sequence = None
            return False
        known.sequence = events.sequence
        known.remove(events.removed)
        known.store(events.stored)
        return True

    def known_blocks(self, key: InstanceKey) -> int:
        """Blocks that an instance is known to have."""
        return len(self._known[key].keys) if key in self._known else 0

    def keys(self, key: InstanceKey) -> frozenset[int]:
        """Short keys of these blocks."""
        return frozenset(self._known[key].keys) if key in self._known else frozenset()

    def lookup(self, request: ValidRequest) -> CachedTokens:
        """Returns how to ask for one request's cached tokens, at any instance and at any time.

        The prompt is hashed block by block, once for all instances that name it alike, and only
        as far as somebody has it.
        """
        return _Lookup(request, self._known, self._alike.values())


def _naming(instance: Instance) -> tuple[bytes, int, int, int]:
    capacity = instance.capacity
    return instance.prefix_seed, instance.layout.cp, capacity.block_size, capacity.dp


class _Lookup(CachedTokens):
    """Of one request's prompt. Most of hundreds of instances have nothing of it."""

    def __init__(
        self,
        request: ValidRequest,
        known: Mapping[InstanceKey, _Known],
        alike: Collection[_Alike],
    ) -> None:
        self._request = request
        self._known = known
        self._alike = alike
        self._chains: dict[tuple[_Alike, int], _Chain] = {}

    def __call__(self, key: InstanceKey, dp_rank: int = 0) -> int:
        known = self._known.get(key)
        if known is None or not known.keys:
            return 0
        return self._chain(known.alike, dp_rank).tokens_in(known.keys)

    def everywhere(self) -> Mapping[InstanceKey, Sequence[int]]:
        found: dict[InstanceKey, list[int]] = {}
        for alike in self._alike:
            capacity = alike.example.capacity
            for dp_rank in range(capacity.dp):
                for key, blocks in alike.beginnings(self._chain(alike, dp_rank)):
                    of_ranks = found.setdefault(key, [0] * capacity.dp)
                    of_ranks[dp_rank] = blocks * capacity.block_size
        return found

    def _chain(self, alike: _Alike, dp_rank: int) -> "_Chain":
        chain = self._chains.get((alike, dp_rank))
        if chain is None:
            chain = self._chains[alike, dp_rank] = _Chain(self._request, alike.example, dp_rank)
        return chain


class _Chain:
    """The short keys of a prompt's full blocks but for its last token, hashed when first needed."""

    def __init__(self, request: ValidRequest, instance: Instance, dp_rank: int) -> None:
        self._block_size = instance.capacity.block_size
        # Prefill has no dp ranks, and decode no cp ranks.
        first = cp_first(instance, request) + dp_rank
        keys = PrefixKeys(seed=instance.prefix_seed)
        self._rest = _hash(request, keys, first, self._block_size)
        self._hashed: list[int] = []

    def __iter__(self) -> Iterator[int]:
        yield from self._hashed
        for short in self._rest:
            self._hashed.append(short)
            yield short

    def tokens_in(self, keys: set[int]) -> int:
        """Tokens of the longest beginning whose blocks are all among the keys."""
        return sum(self._block_size for _ in takewhile(keys.__contains__, self))


def _hash(request: ValidRequest, keys: PrefixKeys, first: int, block_size: int) -> Iterator[int]:
    tokens = request.prompt_token_ids
    above = keys.root(prefix_salt(first, request.cache_salt.encode()))
    # The last token is always computed: its logits are what the prompt is run for.
    for start in range(0, len(tokens) - block_size, block_size):
        above = keys.block(above, keys.piece(tokens[start : start + block_size]))
        yield short_key(above)
