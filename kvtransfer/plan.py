"""Which rank sends what to whom, for one sequence between two layouts.

Pure: layouts and a token range in, regions out; both sides compute the same plan on their own.
Coordinates are global (layer, head and token of the cache group, not of a rank's memory).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from kvtransfer.layout import CacheLayout, KVLayout, Shard, Span

# Pairs of layouts whose token-free part of the plan is remembered.
_TEMPLATES = 256


@dataclass(frozen=True, slots=True)
class Region:
    """A box of one cache group that one rank owes to another: messages tile it."""

    source_rank: int
    target_rank: int
    layers: Span
    heads: Span
    tokens: Span


@dataclass(frozen=True)
class Plan:
    """What one transfer moves of one cache group, by target rank and then by layers.

    `unit` tokens is the smallest grain that both block sizes share. Every region begins on a
    unit, and ends on one but for the sequence's last.
    """

    regions: tuple[Region, ...]
    unit: int

    @cached_property
    def _by_source(self) -> dict[int, tuple[Region, ...]]:
        return _grouped((region.source_rank, region) for region in self.regions)

    @cached_property
    def _by_target(self) -> dict[int, tuple[Region, ...]]:
        return _grouped((region.target_rank, region) for region in self.regions)

    def for_source(self, rank: int) -> tuple[Region, ...]:
        """Return what `rank` has to send."""
        return self._by_source.get(rank, ())

    def for_target(self, rank: int) -> tuple[Region, ...]:
        """Return what `rank` has to receive."""
        return self._by_target.get(rank, ())


def _grouped(keyed: Iterable[tuple[int, Region]]) -> dict[int, tuple[Region, ...]]:
    groups: dict[int, list[Region]] = {}
    for rank, region in keyed:
        groups.setdefault(rank, []).append(region)
    return {rank: tuple(group) for rank, group in groups.items()}


def plan(
    source: KVLayout,
    target: KVLayout,
    tokens: Span,
    total_tokens: int,
    kept: Sequence[int] = (),
) -> Plan:
    """Return the copies that give every target rank its share of `tokens`, each element once.

    `tokens` and `total_tokens` are the sequence's. Of a windowed group only what the window needs
    moves; a state moves with the sequence's last token. `kept` says for each layer how many of
    the group's tokens, from the first on, the target holds already, on all of its ranks: they are
    left out, down to a whole unit; () stands for none. Equal (replicated) source ranks share the
    work by layers.

    Raises ValueError for `tokens` that are not cut on units and for a `kept` that does not fit.
    """
    unit = math.gcd(source.block_size, target.block_size)
    group, total = source.group_tokens(tokens, total_tokens)
    name = source.shape.name
    if tokens.end > total_tokens:
        raise ValueError(f"tokens {tokens} reach beyond the sequence's {total_tokens}")
    if group.begin % unit or (group.end % unit and group.end != total):
        raise ValueError(f"tokens {tokens} must be cut at multiples of {unit} for group {name}")
    if kept and (len(kept) != source.shape.layers or not 0 <= min(kept) <= max(kept) <= total):
        raise ValueError(
            f"kept does not fit {source.shape.layers} layers, {total} tokens of {name}"
        )
    wanted = target.wanted(tokens, total_tokens)
    steps = _steps(kept, unit, total)
    overlaps = _Overlaps(source, target, wanted, total_tokens)
    regions: list[Region] = []
    for link in _links(source, target):
        for span in overlaps.of(link.source_cp, link.target_cp):
            for layers, rest in _without_kept(link.layers, span, steps):
                regions.append(Region(link.source_rank, link.target_rank, layers, link.heads, rest))
    return Plan(tuple(regions), unit)


def plan_cache(
    source: CacheLayout,
    target: CacheLayout,
    tokens: Span,
    total_tokens: int,
    kept: Sequence[Sequence[int]] = (),
) -> tuple[Plan, ...]:
    """Return the plan of each cache group; `kept` holds one sequence for each group, or nothing.

    The caches must be compatible. Raises ValueError as `plan` does.
    """
    if kept and len(kept) != len(source.groups):
        raise ValueError(f"kept is for {len(kept)} cache groups of {len(source.groups)}")
    of_groups = kept or [()] * len(source.groups)
    return tuple(
        plan(ours, theirs, tokens, total_tokens, of_group)
        for ours, theirs, of_group in zip(source.groups, target.groups, of_groups, strict=True)
    )


@dataclass(frozen=True, slots=True)
class _Kept:
    """Neighbouring layers of which the target holds the tokens before `begin`."""

    layers: Span
    begin: int


def _steps(kept: Sequence[int], unit: int, total: int) -> list[_Kept]:
    """Join neighbouring layers of which the same is kept, down to a whole unit."""
    steps: list[_Kept] = []
    for layer, tokens in enumerate(kept):
        begin = tokens if tokens == total else tokens // unit * unit
        first = layer
        if steps and steps[-1].begin == begin:
            first = steps.pop().layers.begin
        steps.append(_Kept(Span(first, layer + 1), begin))
    return steps


def _without_kept(layers: Span, tokens: Span, kept: list[_Kept]) -> list[tuple[Span, Span]]:
    """Cut what is kept off a box; neighbouring layers of which the same is left stay together."""
    if not kept:
        return [(layers, tokens)]
    parts: list[tuple[int, int, int]] = []
    for step in kept:
        first, end = max(step.layers.begin, layers.begin), min(step.layers.end, layers.end)
        begin = max(step.begin, tokens.begin)
        if first >= end or begin >= tokens.end:
            continue
        if parts and parts[-1][1:] == (first, begin):
            first = parts.pop()[0]
        parts.append((first, end, begin))
    return [(Span(first, end), Span(begin, tokens.end)) for first, end, begin in parts]


class _Overlaps:
    """The wanted tokens that a source's and a target's cp share have in common."""

    def __init__(self, source: KVLayout, target: KVLayout, wanted: Span, total_tokens: int) -> None:
        self._of_source = _shares(source, total_tokens)
        self._of_target = _shares(target, total_tokens)
        self._wanted = wanted
        self._made: dict[tuple[int, int], list[Span]] = {}

    def of(self, source_cp: int, target_cp: int) -> list[Span]:
        """Return them in ascending order."""
        made = self._made.get((source_cp, target_cp))
        if made is None:
            met = (
                x.meet(y).meet(self._wanted)
                for x in self._of_source[source_cp]
                for y in self._of_target[target_cp]
            )
            made = sorted(span for span in met if len(span))
            self._made[source_cp, target_cp] = made
        return made


def _shares(layout: KVLayout, total_tokens: int) -> dict[int, tuple[Span, ...]]:
    of_cp = {shard.cp_rank: shard for shard in layout.shards}
    return {cp: layout.tokens_of(shard, total_tokens) for cp, shard in of_cp.items()}


@dataclass(frozen=True, slots=True)
class _Link:
    """What a source rank owes to a target rank of every sequence, whatever its tokens."""

    source_rank: int
    target_rank: int
    source_cp: int
    target_cp: int
    layers: Span
    heads: Span


@lru_cache(maxsize=_TEMPLATES)
def _links(source: KVLayout, target: KVLayout) -> tuple[_Link, ...]:
    """Return all links; the same for every sequence, so made once for a pair of layouts."""
    holders: dict[tuple[Span, Span, int], list[Shard]] = {}
    for shard in source.shards:
        holders.setdefault((shard.layers, shard.heads, shard.cp_rank), []).append(shard)
    # One dealer for each pair of shares: what two pairs move differs in tokens.
    dealers: dict[tuple[Span, Span, int, int], _Dealer] = {}
    links: list[_Link] = []
    for wanting in target.shards:
        owed: list[_Link] = []
        for (held_layers, held_heads, cp), replicas in holders.items():
            layers = held_layers.meet(wanting.layers)
            heads = held_heads.meet(wanting.heads)
            if not len(layers) or not len(heads):
                continue
            key = (held_layers, held_heads, cp, wanting.cp_rank)
            dealer = dealers.setdefault(key, _Dealer(len(replicas)))
            owed += [
                _Link(replicas[i].rank, wanting.rank, cp, wanting.cp_rank, part, heads)
                for i, part in dealer.deal(layers, len(heads))
            ]
        links += sorted(owed, key=lambda o: (o.layers.begin, o.heads.begin, o.source_cp))
    return tuple(links)


class _Dealer:
    """Shares layers among equal source ranks, target after target, so that none sends more.

    The loads never differ by more than one layer of the widest box: all get the same number of
    layers, and what is left over goes to those with the least.
    """

    def __init__(self, replicas: int) -> None:
        self._loads = [0] * replicas
        self._turn = 0

    def deal(self, layers: Span, weight: int) -> list[tuple[int, Span]]:
        """Return (replica, layers)s that make up `layers`, each of which weighs `weight`.

        Every target begins with another replica, so that early layers come from all of them.
        """
        count = len(self._loads)
        each, over = divmod(len(layers), count)
        order = [(self._turn + i) % count for i in range(count)]
        self._turn += 1
        more = set(sorted(order, key=self._loads.__getitem__)[:over])
        dealt: list[tuple[int, Span]] = []
        begin = layers.begin
        for replica in order:
            end = begin + each + (replica in more)
            self._loads[replica] += (end - begin) * weight
            if end > begin:
                dealt.append((replica, Span(begin, end)))
            begin = end
        return dealt
