"""A pass of several sequences: its tensors, each rank's rows of them, and the exact result."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.ring import AttentionShape, Pieces, RingPlan, SequenceShards, zigzag
from engine.ring.shards import positions
from tests.unit.engine.ring.exact import attention, inputs


def scattered(tokens: int, ranks: int, seed: int) -> tuple[Pieces, ...]:
    """Deal tokens to ranks in pieces of random lengths: what many earlier cuts may have left."""
    chance = random.Random(seed)
    cut: list[list[range]] = [[] for _ in range(ranks)]
    begin = 0
    while begin < tokens:
        end = min(tokens, begin + chance.randint(1, 9))
        cut[chance.randrange(ranks)].append(range(begin, end))
        begin = end
    return tuple(map(tuple, cut))


class MadePass:
    """Sequences of (cached, new) tokens over some ranks, with random contents.

    Cached tokens lie zigzag, or scattered; the same arguments make the same pass everywhere.
    """

    def __init__(
        self,
        shape: AttentionShape,
        lengths: Sequence[tuple[int, int]],
        ranks: int,
        *,
        seed: int = 0,
        scatter: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.plan = RingPlan(
            tuple(
                SequenceShards.balanced(
                    new,
                    scattered(cached, ranks, seed + i) if scatter else zigzag(range(cached), ranks),
                )
                for i, (cached, new) in enumerate(lengths)
            ),
            window=shape.window,
        )
        self._made = [
            inputs(seed + i, new, cached + new, shape.heads, shape.kv_heads, shape.head_size)
            for i, (cached, new) in enumerate(lengths)
        ]
        self._made = [(q.to(dtype), kv.to(dtype)) for q, kv in self._made]
        # What a rank has of a token's keys and values; one cell may be both.
        self._heads = shape.planes * shape.kv_heads
        if shape.planes == 1:
            self._made = [(q, kv[:, : self._heads].repeat(1, 2, 1)) for q, kv in self._made]

    def queries(self, rank: int) -> Tensor:
        """Return a rank's rows of queries."""
        return torch.cat(
            [
                q[positions(part.pieces) - sequence.start]
                for (q, _), part, sequence in zip(
                    self._made, self.plan.queries[rank], self.plan.sequences, strict=True
                )
            ]
        )

    def keys(self, rank: int) -> Tensor:
        """Return a rank's rows of keys and values."""
        parts = self.plan.keys[rank]
        return torch.cat(
            [
                kv[positions(part.pieces), : self._heads]
                for (_, kv), part in zip(self._made, parts, strict=True)
            ]
        )

    def expected(self, rank: int) -> Tensor:
        """Return what the rank's attention must be, in float64."""
        outs = []
        for (q, kv), part, sequence in zip(
            self._made, self.plan.queries[rank], self.plan.sequences, strict=True
        ):
            at = positions(part.pieces)
            everything = torch.arange(sequence.end)
            rows = q[at - sequence.start]
            out, _ = attention(rows, torch.from_numpy(at), kv, everything, self.plan.window)
            outs.append(out)
        return torch.cat(outs)
