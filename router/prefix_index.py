"""Owns what the router knows of the instances' prefix caches, and how it looks a prompt up there.

A hint for placement and nothing more: it lags the caches by a moment, and its keys are shortened. A
wrong guess costs a miss. No clock and no stream of its own; bounded for each instance.
"""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import islice

from router.ledger import CachedTokens, InstanceKey
from router.membership import Instance
from router.request import ValidRequest
from router.workers import cp_first
from service.prefix_keys import PrefixKeys, prefix_salt, short_key

# Beyond the blocks of any instance; a key takes about 100 bytes here.
MAX_KEYS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PrefixEvents:
    """What has changed in an instance's cache, as in `worker.proto`."""

    sequence: int
    reset: bool
    stored: Sequence[int]
    removed: Sequence[int]


@dataclass(kw_only=True)
class _Known:
    """What one instance has told. `sequence` is None while a reset is awaited."""

    instance: Instance
    most_keys: int
    # Instances with the same number name a prompt's blocks alike, on as many dp ranks.
    naming: int
    sequence: int | None = None
    keys: set[int] = field(default_factory=set)


class PrefixIndex:
    """Which blocks of prompts each instance has, whatever its role."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        """`max_keys` is what is remembered of one instance at most."""
        self._max_keys = max_keys
        self._known: dict[InstanceKey, _Known] = {}
        self._namings: dict[tuple[bytes, int, int, int], int] = {}
        # The keys of all that name blocks alike, by naming.
        self._alike: dict[int, dict[InstanceKey, set[int]]] = {}

    def join(self, instance: Instance) -> None:
        """Takes an instance in, of which nothing is known yet; one without a seed never tells."""
        if instance.prefix_seed:
            most = min(instance.capacity.blocks, self._max_keys)
            capacity, cp = instance.capacity, instance.layout.cp
            named = (instance.prefix_seed, cp, capacity.block_size, capacity.dp)
            naming = self._namings.setdefault(named, len(self._namings))
            known = _Known(instance=instance, most_keys=most, naming=naming)
            self._known[instance.key] = known
            self._alike.setdefault(naming, {})[instance.key] = known.keys

    def leave(self, key: InstanceKey) -> None:
        """Forgets an instance; unknown ones are no error."""
        known = self._known.pop(key, None)
        if known is not None:
            del self._alike[known.naming][key]

    def take(self, key: InstanceKey, events: PrefixEvents) -> bool:
        """Takes in what an instance tells; False where messages before it are missing.

        All that was known of the instance is forgotten then, until it tells everything again.
        """
        known = self._known.get(key)
        if known is None:
            return True
        if events.reset:
            known.keys.clear()
        elif known.sequence is None or events.sequence != known.sequence + 1:
            known.keys.clear()
            known.sequence = None
            return False
        known.sequence = events.sequence
        known.keys.difference_update(events.removed)
        # No honest instance has more blocks than it said.
        known.keys.update(islice(events.stored, max(0, known.most_keys - len(known.keys))))
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
        return _Lookup(request, self._known, self._alike)


class _Lookup(CachedTokens):
    """Of one request's prompt. Most of hundreds of instances have nothing of it."""

    def __init__(
        self,
        request: ValidRequest,
        known: Mapping[InstanceKey, _Known],
        alike: Mapping[int, Mapping[InstanceKey, set[int]]],
    ) -> None:
        self._request = request
        self._known = known
        self._alike = alike
        self._chains: dict[tuple[int, int], _Chain] = {}

    def __call__(self, key: InstanceKey, dp_rank: int = 0) -> int:
        known = self._known.get(key)
        if known is None or not known.keys:
            return 0
        chain = self._chain(known, dp_rank)
        return chain.tokens_in(known.keys) if chain.first in known.keys else 0

    def holders(self) -> AbstractSet[InstanceKey]:
        found: set[InstanceKey] = set()
        for alike in self._alike.values():
            some = next(iter(alike), None)
            if some is None:
                continue
            for dp_rank in range(self._known[some].instance.capacity.dp):
                first = self._chain(self._known[some], dp_rank).first
                found.update([key for key, keys in alike.items() if first in keys])
        return found

    def _chain(self, known: _Known, dp_rank: int) -> "_Chain":
        chain = self._chains.get((known.naming, dp_rank))
        if chain is None:
            chain = _chain(self._request, known.instance, dp_rank)
            self._chains[known.naming, dp_rank] = chain
        return chain


def _chain(request: ValidRequest, instance: Instance, dp_rank: int) -> "_Chain":
    # Prefill has no dp ranks, and decode no cp ranks.
    first = cp_first(instance, request) + dp_rank
    return _Chain(request, instance.prefix_seed, first, instance.capacity.block_size)


class _Chain:
    """The short keys of a prompt's full blocks but for its last token, hashed when first needed."""

    def __init__(self, request: ValidRequest, seed: bytes, first: int, block_size: int) -> None:
        self._block_size = block_size
        self._rest = _hash(request, PrefixKeys(seed=seed), first, block_size)
        self._hashed = list(islice(self._rest, 1))
        # None where the prompt has no full block: nobody has that.
        self.first = self._hashed[0] if self._hashed else None

    def tokens_in(self, keys: set[int]) -> int:
        """Tokens of the longest beginning whose blocks are all among the keys."""
        for blocks, short in enumerate(self._hashed):
            if short not in keys:
                return blocks * self._block_size
        blocks = len(self._hashed)
        for short in self._rest:
            self._hashed.append(short)
            if short not in keys:
                break
            blocks += 1
        return blocks * self._block_size


def _hash(request: ValidRequest, keys: PrefixKeys, first: int, block_size: int) -> Iterator[int]:
    tokens = request.prompt_token_ids
    above = keys.root(prefix_salt(first, request.cache_salt.encode()))
    # The last token is always computed: its logits are what the prompt is run for.
    for start in range(0, len(tokens) - block_size, block_size):
        above = keys.block(above, keys.piece(tokens[start : start + block_size]))
        yield short_key(above)
