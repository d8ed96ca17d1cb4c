"""How a pool splits a sequence's cache over its ranks.

Owns the description (groups, layers, heads, token shares) and its checks. Knows nothing of memory
addresses, blocks in use, or transfers.

A model's cache is made of groups, each a memory of its own with a block table of its own. Most
groups hold an entry for every token; a state group holds one entry for the whole sequence, which
counts as its only token, [0, 1). Wherever a caller gives tokens or a total, they are the
sequence's; `KVLayout.group_tokens` turns them into a group's.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from kvtransfer.errors import LayoutMismatch

CpOrder = Literal["contiguous", "zigzag", "cyclic"]

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
MAX_GROUPS = 255
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """Half-open range [begin, end)."""

    begin: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end:
            raise ValueError(f"span [{self.begin}, {self.end}) is not a range of counts")

    def __len__(self) -> int:
        return self.end - self.begin

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.begin, self.end))

    def contains(self, other: "Span") -> bool:
        """Whether every member of `other` is one of this span."""
        return self.begin <= other.begin and other.end <= self.end

    def meet(self, other: "Span") -> "Span":
        """Return the common part; an empty span where there is none."""
        begin = max(self.begin, other.begin)
        return Span(begin, max(begin, min(self.end, other.end)))


@dataclass(frozen=True, slots=True)
class Box:
    """Some layers, KV heads and tokens of one sequence, `unit` tokens at a time."""

    layers: Span
    heads: Span
    tokens: Span
    unit: int

    @property
    def units(self) -> int:
        """Units of one layer; a last, part-filled one counts whole."""
        return -(-len(self.tokens) // self.unit)

    @property
    def part(self) -> int:
        """How many tokens a last, part-filled unit has; 0 where all are whole."""
        return len(self.tokens) % self.unit


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """What every rank of both pools must agree on, for one group of the model's cache.

    `planes` are the tensors of one entry: K and V, or 1 for a latent (MLA) and for most states.
    With a `window`, only a sequence's last `window` tokens are needed. With `state`, there is one
    entry for each sequence instead of one for each token (a linear-attention state, one segment of
    a convolution's tail): `kv_heads` are then the units that tp splits, `head_size` the elements
    of a unit.
    """

    name: str = "kv"
    layers: int
    kv_heads: int
    head_size: int
    dtype: str
    planes: int = 2
    window: int | None = None
    state: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"cache group name {self.name!r}: use 1 to 64 of A-Z a-z 0-9 _ . -")
        if min(self.layers, self.kv_heads, self.head_size, self.planes) < 1:
            raise ValueError(f"KV shape needs positive sizes, found {self}")
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(
                f"KV element type {self.dtype!r} is unknown; use one of {sorted(ELEMENT_BYTES)}"
            )
        if self.window is not None and (self.window < 1 or self.state):
            raise ValueError(
                f"cache group {self.name}: a window has at least one token, and a state none; "
                f"found window={self.window}, state={self.state}"
            )

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one rank holds of every sequence."""

    rank: int
    layers: Span
    heads: Span
    cp_rank: int = 0
    cp_size: int = 1


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """One cache group over all ranks of an instance (or of one of its dp ranks).

    Together the ranks hold each element; replicas hold it alike. A state group has block_size 1.
    Under cp, shares of a sequence are cut at multiples of `cp_grain` tokens, a multiple of the
    block size (None: the block size); all groups of a cache should have the same one. Contiguous
    and zigzag shares depend on the sequence's length. Cyclic ones do not: grains are dealt one by
    one, from rank 0 to the last and back again, so that a prompt may come in chunks, and begin
    like another one, and its tokens are still where they belong. The first share is cp rank
    `cp_first`'s and the others follow, so that short sequences need not all lie on one rank.
    """

    shape: KVShape
    block_size: int
    shards: tuple[Shard, ...]
    cp_order: CpOrder = "contiguous"
    cp_grain: int | None = None
    cp_first: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 1 or (self.shape.state and self.block_size != 1):
            raise ValueError(
                f"block_size must be at least 1, and 1 for a state, found {self.block_size}"
            )
        if self.cp_order not in get_args(CpOrder):
            orders = ", ".join(get_args(CpOrder))
            raise ValueError(f"cp_order must be one of {orders}; found {self.cp_order!r}")
        if self.grain < 1 or self.grain % self.block_size:
            raise ValueError(
                f"cp_grain must be a multiple of the block size {self.block_size}, "
                f"found {self.cp_grain}"
            )
        if not 0 <= self.cp_first < max((s.cp_size for s in self.shards), default=1):
            raise ValueError(f"cp_first must be one of the cp ranks, found {self.cp_first}")
        if len({shard.rank for shard in self.shards}) != len(self.shards):
            raise ValueError("two shards have the same rank")
        for shard in self.shards:
            self._check_shard(shard)
        self._check_cover()

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """The hash, made once: layouts are keys of caches that every transfer asks."""
        parts = (self.block_size, self.shards, self.cp_order, self.cp_grain, self.cp_first)
        return hash((self.shape, *parts))

    def _check_shard(self, shard: Shard) -> None:
        shape = self.shape
        if not Span(0, shape.layers).contains(shard.layers) or not len(shard.layers):
            raise ValueError(f"rank {shard.rank}: layers {shard.layers} of {shape.layers}")
        if not Span(0, shape.kv_heads).contains(shard.heads) or not len(shard.heads):
            raise ValueError(f"rank {shard.rank}: heads {shard.heads} of {shape.kv_heads}")
        if not 0 <= shard.cp_rank < shard.cp_size:
            raise ValueError(f"rank {shard.rank}: cp share {shard.cp_rank} of {shard.cp_size}")

    def _check_cover(self) -> None:
        """Different holdings must not overlap and must leave no gap, or plans would be wrong."""
        if len({shard.cp_size for shard in self.shards}) > 1:
            raise ValueError("all shards of a layout need the same cp_size")
        holdings = {(s.layers, s.heads, s.cp_rank): s for s in self.shards}
        cp_size = self.shards[0].cp_size if self.shards else 1
        area = sum(len(layers) * len(heads) for layers, heads, _ in holdings)
        if area != self.shape.layers * self.shape.kv_heads * cp_size:
            raise ValueError("the shards do not hold every layer and head exactly once")
        distinct = list(holdings)
        for i, (layers, heads, cp_rank) in enumerate(distinct):
            for other_layers, other_heads, other_cp in distinct[i + 1 :]:
                if cp_rank == other_cp and layers.meet(other_layers) and heads.meet(other_heads):
                    raise ValueError("two shards overlap in part; replicas must be equal")

    @cached_property
    def _by_rank(self) -> dict[int, Shard]:
        return {shard.rank: shard for shard in self.shards}

    @property
    def grain(self) -> int:
        """Tokens at whose multiples cp cuts a sequence."""
        return self.block_size if self.cp_grain is None else self.cp_grain

    def shard(self, rank: int) -> Shard:
        """Return what `rank` holds; raises ValueError for a rank that the layout lacks."""
        try:
            return self._by_rank[rank]
        except KeyError:
            raise ValueError(
                f"rank {rank} is not in the layout of {len(self.shards)} ranks"
            ) from None

    def group_tokens(self, tokens: Span, total_tokens: int) -> tuple[Span, int]:
        """Return `tokens` of a sequence, and its total, as this group counts them.

        A state group's one entry is what it is only after the sequence's last token: it goes with
        the tokens that reach the end, [0, 1), and no others have any part in it.
        """
        if not self.shape.state:
            return tokens, total_tokens
        return Span(0, 1 if len(tokens) and tokens.end >= total_tokens else 0), 1

    def wanted(self, tokens: Span, total_tokens: int) -> Span:
        """Return the group's tokens that a target of this layout needs of a sequence's `tokens`.

        A window begins at a whole block of this layout.
        """
        part, total = self.group_tokens(tokens, total_tokens)
        begin = self.window_begin(total_tokens)
        return part.meet(Span(begin, max(begin, total)))

    def window_begin(self, total_tokens: int) -> int:
        """Return the first token that is still needed, down to a whole block; 0 without window."""
        if self.shape.window is None:
            return 0
        return max(0, total_tokens - self.shape.window) // self.block_size * self.block_size

    def tokens_of(self, shard: Shard, total_tokens: int) -> tuple[Span, ...]:
        """Return the spans of the group's tokens that a shard holds of a sequence, ascending.

        A sequence is cut at multiples of `grain`. A state is held where its last token is.
        """
        shares = self._shares(shard, total_tokens)
        if not self.shape.state:
            return shares
        return (Span(0, 1),) if shares and shares[-1].end == total_tokens else ()

    def _shares(self, shard: Shard, total_tokens: int) -> tuple[Span, ...]:
        """Return a shard's spans of a sequence of one entry a token.

        Zigzag deals 2*cp_size chunks so that early (cheap) and late (dear) ones pair up, as ring
        attention under a causal mask wants it.
        """
        grains = -(-total_tokens // self.grain)
        if self.cp_order == "cyclic" and shard.cp_size > 1:
            return self._dealt(shard, grains, total_tokens)
        place = (shard.cp_rank - self.cp_first) % shard.cp_size
        zigzag = self.cp_order == "zigzag" and shard.cp_size > 1
        chunks = 2 * shard.cp_size if zigzag else shard.cp_size
        chunk_tokens = -(-grains // chunks) * self.grain
        mine = (place, chunks - 1 - place) if zigzag else (place,)
        spans = (
            Span(min(i * chunk_tokens, total_tokens), min((i + 1) * chunk_tokens, total_tokens))
            for i in mine
        )
        return _joined(span for span in spans if len(span))

    def _dealt(self, shard: Shard, grains: int, total_tokens: int) -> tuple[Span, ...]:
        """Return a shard's spans where grains are dealt in rounds, there and back."""
        there = (shard.cp_rank - self.cp_first) % shard.cp_size
        back = 2 * shard.cp_size - 1 - there
        mine = (first + i for first in range(0, grains, 2 * shard.cp_size) for i in (there, back))
        return _joined(
            Span(i * self.grain, min((i + 1) * self.grain, total_tokens))
            for i in mine
            if i < grains
        )


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].end == span.begin:
            joined[-1] = Span(joined[-1].begin, span.end)
        else:
            joined.append(span)
    return tuple(joined)


@dataclass(frozen=True)
class CacheLayout:
    """A model's whole cache: one layout for each group, over the same ranks.

    The layout of an instance with dp holds its dp ranks as replicas. A sequence lives on one of
    them, so transfers are planned with `dp_rank(...)`.
    """

    groups: tuple[KVLayout, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.groups) <= MAX_GROUPS:
            raise ValueError(f"a cache has 1 to {MAX_GROUPS} groups, found {len(self.groups)}")
        names = [group.shape.name for group in self.groups]
        if len(set(names)) != len(names):
            raise ValueError(f"cache groups need names of their own, found {names}")
        for group in self.groups[1:]:
            if {s.rank for s in group.shards} != set(self.ranks):
                raise ValueError(f"cache group {group.shape.name} is held by other ranks")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.groups)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """All ranks, in the order of the first group's shards."""
        return tuple(shard.rank for shard in self.groups[0].shards)

    def begun_at(self, cp_first: int) -> "CacheLayout":
        """Return the layout of a sequence whose first share lies on cp rank `cp_first`."""
        return CacheLayout(tuple(replace(group, cp_first=cp_first) for group in self.groups))

    def of_ranks(self, ranks: Collection[int]) -> "CacheLayout":
        """Return the layout of some ranks, which keep their numbers.

        Raises ValueError where they do not hold the whole cache.
        """
        return CacheLayout(
            tuple(
                replace(group, shards=tuple(s for s in group.shards if s.rank in ranks))
                for group in self.groups
            )
        )

    def dp_rank(self, dp_rank: int, dp: int) -> "CacheLayout":
        """Return the layout of one of `dp` dp ranks: equal parts of the ranks, one after another.

        Raises ValueError for parts that are not equal or do not each hold the whole cache.
        """
        if not 0 <= dp_rank < dp or len(self.ranks) % dp:
            raise ValueError(f"dp rank {dp_rank} of {dp} over {len(self.ranks)} ranks")
        each = len(self.ranks) // dp
        return self.of_ranks(self.ranks[dp_rank * each : (dp_rank + 1) * each])


def uniform(
    shape: KVShape,
    block_size: int,
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    dp: int = 1,
    cp_order: CpOrder = "contiguous",
    cp_grain: int | None = None,
) -> KVLayout:
    """Return the layout of dp x pp x cp x tp ranks, tp fastest; tp > kv_heads replicates heads.

    A state group has blocks of 1, and the shares of a cache with blocks of `block_size`. Raises
    ValueError where tp and kv_heads do not divide one another or pp exceeds the layers.
    """
    if min(tp, pp, cp, dp) < 1 or pp > shape.layers:
        raise ValueError(f"{dp=} {tp=} {pp=} {cp=} does not fit {shape.layers} layers")
    if shape.kv_heads % tp and tp % shape.kv_heads:
        raise ValueError(f"tp={tp} and {shape.kv_heads} KV heads do not divide one another")
    heads_each = max(1, shape.kv_heads // tp)
    replicas = max(1, tp // shape.kv_heads)
    shards: list[Shard] = []
    for stage in [*range(pp)] * dp:
        layers = Span(shape.layers * stage // pp, shape.layers * (stage + 1) // pp)
        for cp_rank in range(cp):
            for t in range(tp):
                first = (t // replicas) * heads_each
                shards.append(
                    Shard(
                        rank=len(shards),
                        layers=layers,
                        heads=Span(first, first + heads_each),
                        cp_rank=cp_rank,
                        cp_size=cp,
                    )
                )
    return KVLayout(
        shape=shape,
        block_size=1 if shape.state else block_size,
        shards=tuple(shards),
        cp_order=cp_order,
        cp_grain=cp_grain or (block_size if shape.state else None),
    )


def uniform_cache(
    shapes: Iterable[KVShape],
    block_size: int,
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    dp: int = 1,
    cp_order: CpOrder = "contiguous",
    cp_grain: int | None = None,
) -> CacheLayout:
    """Return a cache of `uniform` groups; each group's layers are split over pp for themselves."""
    return CacheLayout(
        tuple(
            uniform(
                shape, block_size, tp=tp, pp=pp, cp=cp, dp=dp, cp_order=cp_order, cp_grain=cp_grain
            )
            for shape in shapes
        )
    )


def check_compatible(a: CacheLayout, b: CacheLayout) -> None:
    """Raise LayoutMismatch naming the first field in which two caches cannot be exchanged."""
    if len(a.groups) != len(b.groups):
        raise LayoutMismatch(
            f"KV groups differ: {len(a.groups)} here, {len(b.groups)} there; "
            f"both pools must serve one model"
        )
    for ours, theirs in zip(a.groups, b.groups, strict=True):
        _check_group(ours, theirs)


def _check_group(a: KVLayout, b: KVLayout) -> None:
    group = f"of cache group {a.shape.name!r}"
    for field in ("name", "layers", "kv_heads", "head_size", "planes", "window", "state", "dtype"):
        ours, theirs = getattr(a.shape, field), getattr(b.shape, field)
        if ours != theirs:
            why = "both pools must serve one model"
            if field == "dtype":
                why = "caches of different element types are not supported yet"
            raise LayoutMismatch(f"KV {field} {group} differs: {ours} here, {theirs} there; {why}")
    if a.block_size % b.block_size and b.block_size % a.block_size:
        raise LayoutMismatch(
            f"KV block_size {group} differs: {a.block_size} here, {b.block_size} there; "
            f"one must be a multiple of the other"
        )


def compatibility_hash(protocol_version: int, fingerprint: str, shapes: Sequence[KVShape]) -> bytes:
    """Return 32 bytes that two ranks must share before they exchange anything."""
    parts = ["twinpool-kv", protocol_version, fingerprint, [astuple(shape) for shape in shapes]]
    return hashlib.sha256(json.dumps(parts).encode()).digest()
