"""Which rank sends what to whom, for one sequence between two layouts.

Pure: layouts and a token range in, pieces out; both sides compute the same plan on their own.
Coordinates are global (layer, head and token of the model, not of a rank's memory).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from kvtransfer.layout import KVLayout, Shard, Span


@dataclass(frozen=True, slots=True)
class Piece:
    """K and V of one layer, a head range and a token range, from one rank to another."""

    source_rank: int
    target_rank: int
    layer: int
    heads: Span
    tokens: Span


@dataclass(frozen=True, slots=True)
class Region:
    """Pieces of neighbouring layers with one head and token range: a box that messages tile."""

    source_rank: int
    target_rank: int
    layers: Span
    heads: Span
    tokens: Span


@dataclass(frozen=True)
class Plan:
    """All pieces of one transfer; `unit` tokens is the smallest grain both block sizes share."""

    pieces: tuple[Piece, ...]
    unit: int

    @cached_property
    def _by_source(self) -> dict[int, tuple[Piece, ...]]:
        return _grouped(self.pieces, "source_rank")

    @cached_property
    def _by_target(self) -> dict[int, tuple[Piece, ...]]:
        return _grouped(self.pieces, "target_rank")

    def for_source(self, rank: int) -> tuple[Piece, ...]:
        """Return what `rank` has to send."""
        return self._by_source.get(rank, ())

    def for_target(self, rank: int) -> tuple[Piece, ...]:
        """Return what `rank` has to receive."""
        return self._by_target.get(rank, ())


def _grouped(pieces: Iterable[Piece], key: str) -> dict[int, tuple[Piece, ...]]:
    groups: dict[int, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(getattr(piece, key), []).append(piece)
    return {rank: tuple(group) for rank, group in groups.items()}


def plan(source: KVLayout, target: KVLayout, tokens: Span, total_tokens: int) -> Plan:
    """Return the copies that give every target rank its share of `tokens`, each element once.

    Equal (replicated) source ranks share the work by layers, rotated per target, so that none of
    them sends more than its part. Raises ValueError where `tokens` does not begin on a unit.
    """
    unit = math.gcd(source.block_size, target.block_size)
    if tokens.end > total_tokens:
        raise ValueError(f"tokens {tokens} reach beyond the sequence's {total_tokens}")
    if tokens.begin % unit or (tokens.end % unit and tokens.end != total_tokens):
        raise ValueError(f"tokens {tokens} must be cut at multiples of {unit}")
    holders: dict[tuple[Span, Span, int], list[Shard]] = {}
    for shard in source.shards:
        holders.setdefault((shard.layers, shard.heads, shard.cp_rank), []).append(shard)
    pieces: list[Piece] = []
    for turn, wanting in enumerate(target.shards):
        wanted_tokens = target.tokens_of(wanting, total_tokens)
        for replicas in holders.values():
            holding = replicas[0]
            layers = holding.layers.meet(wanting.layers)
            heads = holding.heads.meet(wanting.heads)
            if not len(layers) or not len(heads):
                continue
            spans = _overlaps(source.tokens_of(holding, total_tokens), wanted_tokens, tokens)
            for layer in layers:
                share = (layer - layers.begin) * len(replicas) // len(layers)
                sender = replicas[(share + turn) % len(replicas)]
                pieces += [Piece(sender.rank, wanting.rank, layer, heads, s) for s in spans]
    pieces.sort(key=lambda p: (p.layer, p.tokens, p.heads, p.target_rank))
    return Plan(tuple(pieces), unit)


def _overlaps(a: tuple[Span, ...], b: tuple[Span, ...], within: Span) -> list[Span]:
    met = (x.meet(y).meet(within) for x in a for y in b)
    return sorted(span for span in met if len(span))


def regions(pieces: Iterable[Piece]) -> tuple[Region, ...]:
    """Join pieces of neighbouring layers that agree in everything else."""
    columns: dict[tuple[int, int, Span, Span], list[int]] = {}
    for p in pieces:
        columns.setdefault((p.source_rank, p.target_rank, p.heads, p.tokens), []).append(p.layer)
    boxes = []
    for (source_rank, target_rank, heads, tokens), layers in columns.items():
        for run in _runs(sorted(layers)):
            boxes.append(Region(source_rank, target_rank, run, heads, tokens))
    return tuple(boxes)


def _runs(numbers: list[int]) -> list[Span]:
    runs: list[Span] = []
    for n in numbers:
        if runs and runs[-1].end == n:
            runs[-1] = Span(runs[-1].begin, n + 1)
        else:
            runs.append(Span(n, n + 1))
    return runs
