"""Random layouts, and KV memories whose every element tells where it belongs."""

import random
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from kvtransfer.layout import KVLayout, KVShape, Shard, Span, uniform

CANARY = -7.0

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@st.composite
def shapes(draw: st.DrawFn) -> KVShape:
    return KVShape(
        layers=draw(st.integers(1, 4)),
        kv_heads=draw(st.sampled_from([1, 2, 4])),
        head_size=draw(st.sampled_from([1, 3, 4])),
        dtype="float32",
    )


@st.composite
def layouts(draw: st.DrawFn, shape: KVShape) -> KVLayout:
    tp = draw(st.sampled_from([t for t in (1, 2, 4, 8) if t <= 2 * shape.kv_heads]))
    return uniform(
        shape,
        draw(st.sampled_from([1, 2, 4, 6, 8])),
        tp=tp,
        pp=draw(st.integers(1, min(2, shape.layers))),
        cp=draw(st.integers(1, 3)),
        cp_order=draw(st.sampled_from(["contiguous", "zigzag"])),
    )


def whole(shape: KVShape, tokens: int, seed: int) -> torch.Tensor:
    """The cache of one sequence, [layers, 2, heads, tokens, head_size], no two elements alike."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.layers, 2, shape.kv_heads, tokens, shape.head_size)
    return torch.randn(size, generator=generator).to(DTYPES[shape.dtype])


@dataclass
class RankMemory:
    """One rank's blocks, those of one sequence scattered among blocks of others."""

    layout: KVLayout
    shard: Shard
    kv: torch.Tensor
    block_ids: list[int]
    total_tokens: int

    @classmethod
    def make(
        cls, layout: KVLayout, rank: int, total_tokens: int, rng: random.Random, spare: int = 3
    ) -> "RankMemory":
        shard = layout.shard(rank)
        held = sum(len(s) for s in layout.tokens_of(shard, total_tokens))
        need = -(-held // layout.block_size)
        blocks = need + spare
        shape = layout.shape
        size = (len(shard.layers), 2, blocks, len(shard.heads), layout.block_size, shape.head_size)
        kv = torch.full(size, CANARY, dtype=DTYPES[shape.dtype])
        ids = rng.sample(range(blocks), need) if rng.random() < 0.5 else list(range(1, need + 1))
        return cls(layout, shard, kv, ids, total_tokens)

    def _tokens(self) -> torch.Tensor:
        """View of this sequence, [layers, 2, heads, tokens held, head_size] (a copy)."""
        part = self.kv[:, :, self.block_ids].permute(0, 1, 3, 2, 4, 5)
        return part.reshape(*part.shape[:3], -1, part.shape[-1])

    def _held(self) -> list[int]:
        return [t for s in self.layout.tokens_of(self.shard, self.total_tokens) for t in s]

    def fill(self, cache: torch.Tensor) -> None:
        """Write the sequence's true values."""
        for place, token in enumerate(self._held()):
            block, offset = divmod(place, self.layout.block_size)
            self.kv[:, :, self.block_ids[block], :, offset] = self._true(cache, [token])[:, :, :, 0]

    def _true(self, cache: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        layers, heads = self.shard.layers, self.shard.heads
        return cache[layers.begin : layers.end, :, heads.begin : heads.end][:, :, :, tokens]

    def check(self, cache: torch.Tensor, tokens: Span) -> None:
        """Assert: `tokens` are right, nothing else was touched but a last block's zeroed rest."""
        found = self._tokens()
        for place, token in enumerate(self._held()):
            if tokens.begin <= token < tokens.end:
                assert torch.equal(found[:, :, :, place], self._true(cache, [token])[:, :, :, 0])
            else:
                assert bool((found[:, :, :, place] == CANARY).all()), f"token {token} was touched"
        rest = found[:, :, :, len(self._held()) :]
        assert bool(((rest == CANARY) | (rest == 0)).all())
        others = [b for b in range(self.kv.shape[2]) if b not in self.block_ids]
        assert bool((self.kv[:, :, others] == CANARY).all()), "a foreign block was touched"
