"""Random caches and layouts, and memories whose every element tells where it belongs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from kvtransfer.layout import (
    CacheLayout,
    CpOrder,
    KVLayout,
    KVShape,
    Shard,
    Span,
    uniform,
    uniform_cache,
)

CANARY = -7.0

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCK_SIZES = [(1, 1), (1, 3), (2, 2), (2, 4), (2, 6), (4, 4), (4, 8), (8, 8), (6, 6)]


@st.composite
def shapes(draw: st.DrawFn, name: str = "kv") -> KVShape:
    """One cache group of any kind."""
    kind = draw(st.sampled_from(["kv", "latent", "window", "state"]))
    return KVShape(
        name=name,
        layers=draw(st.integers(1, 4)),
        kv_heads=1 if kind == "latent" else draw(st.sampled_from([1, 2, 4])),
        head_size=draw(st.sampled_from([1, 3, 4])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        planes=2 if kind in ("kv", "window") else 1,
        window=draw(st.integers(1, 30)) if kind == "window" else None,
        state=kind == "state",
    )


@st.composite
def models(draw: st.DrawFn) -> tuple[KVShape, ...]:
    """The groups of one model."""
    return tuple(draw(shapes(f"g{i}")) for i in range(draw(st.integers(1, 3))))


@st.composite
def layouts(draw: st.DrawFn, shape: KVShape, block_size: int) -> KVLayout:
    """One group on up to 16 ranks, with fewer, as many or more ranks than heads."""
    cp = draw(st.sampled_from([1, 1, 2, 3]))
    made = uniform(
        shape,
        block_size,
        tp=draw(st.sampled_from([t for t in (1, 2, 4, 8) if t <= 4 * shape.kv_heads])),
        pp=draw(st.integers(1, min(2, shape.layers))),
        cp=cp,
        cp_order=draw(_CP_ORDERS),
        cp_grain=None if shape.state else block_size * draw(st.sampled_from([1, 1, 2, 3])),
    )
    return replace(made, cp_first=draw(st.integers(0, cp - 1)))


_CP_ORDERS: st.SearchStrategy[CpOrder] = st.sampled_from(["contiguous", "zigzag", "cyclic"])


@st.composite
def caches(draw: st.DrawFn, model: tuple[KVShape, ...], block_size: int) -> CacheLayout:
    """A whole cache on one dp rank of an instance."""
    dp, cp = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 2, 3]))
    made = uniform_cache(
        model,
        block_size,
        tp=draw(st.sampled_from([1, 2, 4])),
        pp=draw(st.integers(1, min(2, *(shape.layers for shape in model), 2))),
        cp=cp,
        dp=dp,
        cp_order=draw(_CP_ORDERS),
        cp_grain=block_size * draw(st.sampled_from([1, 1, 2, 3])),
    ).dp_rank(draw(st.integers(0, dp - 1)), dp)
    return made.begun_at(draw(st.integers(0, cp - 1)))


@st.composite
def cache_pairs(draw: st.DrawFn) -> tuple[CacheLayout, CacheLayout]:
    """One model in two pools, whose block sizes divide one another."""
    model = draw(models())
    sizes = draw(st.permutations(draw(st.sampled_from(BLOCK_SIZES))))
    return draw(caches(model, sizes[0])), draw(caches(model, sizes[1]))


@st.composite
def token_ranges(draw: st.DrawFn, total: int, *layouts: CacheLayout) -> Span:
    """Tokens of a sequence, cut at blocks of all layouts."""
    grain = max(group.block_size for layout in layouts for group in layout.groups)
    begin = draw(st.sampled_from([0, *range(0, total + 1, grain)]))
    return Span(begin, draw(st.sampled_from([total, *range(begin, total, grain)])))


def whole(shape: KVShape, tokens: int, seed: int) -> torch.Tensor:
    """The group's cache of one sequence, [layers, planes, heads, tokens, head_size], at random."""
    generator = torch.Generator().manual_seed(seed)
    entries = 1 if shape.state else tokens
    size = (shape.layers, shape.planes, shape.kv_heads, entries, shape.head_size)
    return torch.randn(size, generator=generator).to(DTYPES[shape.dtype])


@dataclass
class RankMemory:
    """One rank's blocks, those of one sequence scattered among blocks of others."""

    layout: KVLayout
    shard: Shard
    kv: torch.Tensor
    block_ids: list[int]
    total_tokens: int
    surroundings: torch.Tensor | None = None

    @classmethod
    def make(
        cls,
        layout: KVLayout,
        rank: int,
        total_tokens: int,
        rng: random.Random,
        spare: int = 3,
        *,
        strided: bool = False,
    ) -> "RankMemory":
        """Fill a memory with canaries; a strided one is part of a larger tensor."""
        shard, shape = layout.shard(rank), layout.shape
        held = sum(len(s) for s in layout.tokens_of(shard, total_tokens))
        need = -(-held // layout.block_size)
        blocks, heads = need + spare, len(shard.heads)
        entry = (layout.block_size, shape.head_size)
        dtype, surroundings = DTYPES[shape.dtype], None
        if strided:
            size = (blocks, shape.planes, len(shard.layers), heads + 2, *entry)
            surroundings = torch.full(size, CANARY, dtype=dtype)
            kv = surroundings[:, :, :, 1:-1].permute(2, 1, 0, 3, 4, 5)
        else:
            size = (len(shard.layers), shape.planes, blocks, heads, *entry)
            kv = torch.full(size, CANARY, dtype=dtype)
        ids = rng.sample(range(blocks), need) if rng.random() < 0.5 else list(range(1, need + 1))
        return cls(layout, shard, kv, ids, total_tokens, surroundings)

    @property
    def held(self) -> list[int]:
        """The group's tokens that this rank holds."""
        return [t for s in self.layout.tokens_of(self.shard, self.total_tokens) for t in s]

    def tokens(self) -> torch.Tensor:
        """A copy of this sequence's blocks, [layers, planes, heads, tokens, head_size]."""
        part = self.kv[:, :, self.block_ids].permute(0, 1, 3, 2, 4, 5)
        return part.reshape(*part.shape[:3], -1, part.shape[-1])

    def _part(self, cache: torch.Tensor) -> torch.Tensor:
        """This rank's part of a cache, of its tokens in their order."""
        layers, heads = self.shard.layers, self.shard.heads
        part = cache[layers.begin : layers.end, :, heads.begin : heads.end]
        return part[:, :, :, self.held]

    def fill(self, cache: torch.Tensor) -> None:
        """Write the sequence's true values; the rest of its last block stays a canary."""
        entries = self.tokens()
        entries[:, :, :, : len(self.held)] = self._part(cache)
        size = (*entries.shape[:3], -1, self.layout.block_size, entries.shape[-1])
        self.kv[:, :, self.block_ids] = entries.reshape(size).permute(0, 1, 3, 2, 4, 5)

    def check(self, cache: torch.Tensor, tokens: Span, kept: Sequence[int] = ()) -> None:
        """Assert: what of `tokens` is wanted and not kept is right, and nothing else was touched.

        The rest of a last block whose last token was moved is zero.
        """
        wanted = self.layout.wanted(tokens, self.total_tokens)
        held, found = torch.tensor(self.held, dtype=torch.long), self.tokens()
        want = torch.full_like(found, CANARY)
        part = self._part(cache)
        for i, layer in enumerate(self.shard.layers):
            begin = max(wanted.begin, kept[layer] if kept else 0)
            moved = (held >= begin) & (held < wanted.end)
            places = moved.nonzero().flatten()
            want[i][:, :, places] = part[i][:, :, places]
            if len(held) and moved[-1]:
                want[i, :, :, len(held) :] = 0
        assert torch.equal(found, want), "a token is wrong, missing, or was touched"
        others = [b for b in range(self.kv.shape[2]) if b not in self.block_ids]
        assert bool((self.kv[:, :, others] == CANARY).all()), "a foreign block was touched"
        if self.surroundings is not None:
            assert bool((self.surroundings[:, :, :, [0, -1]] == CANARY).all()), "not our memory"
