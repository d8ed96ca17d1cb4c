"""How a pool splits the KV cache over its ranks.

Owns the description (layers, heads, token shares) and its checks. Knows nothing of memory
addresses, blocks in use, or transfers.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from kvtransfer.errors import LayoutMismatch

CpOrder = Literal["contiguous", "zigzag"]

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


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


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """What every rank of both pools must agree on."""

    layers: int
    kv_heads: int
    head_size: int
    dtype: str

    def __post_init__(self) -> None:
        if min(self.layers, self.kv_heads, self.head_size) < 1:
            raise ValueError(f"KV shape needs positive sizes, found {self}")
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(
                f"KV element type {self.dtype!r} is unknown; use one of {sorted(ELEMENT_BYTES)}"
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
    """All ranks of one instance; together they hold each element, replicas hold it alike."""

    shape: KVShape
    block_size: int
    shards: tuple[Shard, ...]
    cp_order: CpOrder = "contiguous"

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, found {self.block_size}")
        if self.cp_order not in ("contiguous", "zigzag"):
            raise ValueError(f"cp_order must be contiguous or zigzag, found {self.cp_order!r}")
        if len({shard.rank for shard in self.shards}) != len(self.shards):
            raise ValueError("two shards have the same rank")
        for shard in self.shards:
            self._check_shard(shard)
        self._check_cover()

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

    def shard(self, rank: int) -> Shard:
        """Return what `rank` holds; raises ValueError for a rank that the layout lacks."""
        try:
            return self._by_rank[rank]
        except KeyError:
            raise ValueError(
                f"rank {rank} is not in the layout of {len(self.shards)} ranks"
            ) from None

    def tokens_of(self, shard: Shard, total_tokens: int) -> tuple[Span, ...]:
        """Return the shard's token spans of a sequence, ascending, cut on block boundaries.

        Zigzag deals 2*cp_size chunks so that early (cheap) and late (dear) ones pair up, as ring
        attention under a causal mask wants it.
        """
        blocks = -(-total_tokens // self.block_size)
        zigzag = self.cp_order == "zigzag" and shard.cp_size > 1
        chunks = 2 * shard.cp_size if zigzag else shard.cp_size
        chunk_tokens = -(-blocks // chunks) * self.block_size
        mine = (shard.cp_rank, chunks - 1 - shard.cp_rank) if zigzag else (shard.cp_rank,)
        spans = (
            Span(min(i * chunk_tokens, total_tokens), min((i + 1) * chunk_tokens, total_tokens))
            for i in mine
        )
        return _joined(span for span in spans if len(span))


def _joined(spans: Iterator[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].end == span.begin:
            joined[-1] = Span(joined[-1].begin, span.end)
        else:
            joined.append(span)
    return tuple(joined)


def uniform(
    shape: KVShape,
    block_size: int,
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    cp_order: CpOrder = "contiguous",
) -> KVLayout:
    """Return the layout of pp x cp x tp ranks, tp fastest; with tp > kv_heads heads are replicated.

    Raises ValueError where tp and kv_heads do not divide one another or pp exceeds the layers.
    """
    if min(tp, pp, cp) < 1 or pp > shape.layers:
        raise ValueError(f"tp={tp} pp={pp} cp={cp} does not fit {shape.layers} layers")
    if shape.kv_heads % tp and tp % shape.kv_heads:
        raise ValueError(f"tp={tp} and {shape.kv_heads} KV heads do not divide one another")
    heads_each = max(1, shape.kv_heads // tp)
    replicas = max(1, tp // shape.kv_heads)
    shards: list[Shard] = []
    for stage in range(pp):
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
    return KVLayout(shape=shape, block_size=block_size, shards=tuple(shards), cp_order=cp_order)


def check_compatible(a: KVLayout, b: KVLayout) -> None:
    """Raise LayoutMismatch naming the first field in which two layouts cannot exchange KV."""
    for field in ("layers", "kv_heads", "head_size", "dtype"):
        ours, theirs = getattr(a.shape, field), getattr(b.shape, field)
        if ours != theirs:
            raise LayoutMismatch(
                f"KV {field} differs: {ours} here, {theirs} there; both pools must serve one model"
            )


def compatibility_hash(protocol_version: int, fingerprint: str, shape: KVShape) -> bytes:
    """Return 32 bytes that two ranks must share before they exchange anything."""
    text = "\n".join(
        str(part)
        for part in (
            "twinpool-kv",
            protocol_version,
            fingerprint,
            shape.layers,
            shape.kv_heads,
            shape.head_size,
            shape.dtype,
        )
    )
    return hashlib.sha256(text.encode()).digest()
