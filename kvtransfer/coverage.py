"""Which part of a box is done: exact bookkeeping of tokens per layer.

Pure. `Ready` is the sender's side (what compute has finished and may be sent); `Coverage` is the
receiver's (what has arrived, each element exactly once).
"""

from collections.abc import Iterable, Sequence

from kvtransfer.layout import KVLayout, Span
from kvtransfer.plan import Region


class Ready:
    """Tokens of one layer that compute has finished, handed out once in whole units."""

    def __init__(self, tokens: Span, unit: int) -> None:
        self._tokens = tokens
        self._unit = unit
        self._done: list[Span] = []

    def add(self, tokens: Span) -> list[Span]:
        """Mark tokens as final; return what has newly become sendable, cut on units."""
        new = tokens.meet(self._tokens)
        if not len(new):
            return []
        touching = [s for s in self._done if s.end >= new.begin and s.begin <= new.end]
        whole = Span(
            min([new.begin, *(s.begin for s in touching)]),
            max([new.end, *(s.end for s in touching)]),
        )
        self._done = sorted([s for s in self._done if s not in touching] + [whole])
        fresh = [self._aligned(whole)]
        for old in touching:
            fresh = [rest for span in fresh for rest in _without(span, self._aligned(old))]
        return [span for span in fresh if len(span)]

    def _aligned(self, span: Span) -> Span:
        begin = -(-span.begin // self._unit) * self._unit
        end = span.end // self._unit * self._unit
        if span.end == self._tokens.end:
            end = span.end
        return Span(begin, max(begin, end))


def _without(span: Span, cut: Span) -> list[Span]:
    if not len(cut) or not len(span.meet(cut)):
        return [span]
    return [
        Span(span.begin, max(span.begin, cut.begin)),
        Span(min(span.end, cut.end), span.end),
    ]


class Coverage:
    """What has arrived of the regions of one cache group that one source rank has to send."""

    def __init__(self, regions: Iterable[Region], unit: int) -> None:
        self._unit = unit
        self._regions = [(region, [0] * len(region.layers)) for region in regions]
        self.missing_units = sum(
            len(region.layers) * self._units(region.tokens) for region, _ in self._regions
        )

    def _units(self, tokens: Span) -> int:
        return -(-len(tokens) // self._unit)

    def refusal(self, layers: Span, heads: Span, tokens: Span) -> str | None:
        """Return why a box must not come, or not again; None for one that may."""
        found = self._find(layers, heads, tokens)
        return found if isinstance(found, str) else None

    def take(self, layers: Span, heads: Span, tokens: Span) -> str | None:
        """Mark a box as arrived, or return why it must be refused; nothing changes then."""
        found = self._find(layers, heads, tokens)
        if isinstance(found, str):
            return found
        masks, mine, mask = found
        for i in mine:
            masks[i] |= mask
        self.missing_units -= len(layers) * self._units(tokens)
        return None

    def _find(self, layers: Span, heads: Span, tokens: Span) -> str | tuple[list[int], range, int]:
        """Return (the region's masks, which of them, the bits) of a box, or why there are none."""
        found = next(
            (
                (region, masks)
                for region, masks in self._regions
                if region.heads == heads
                and region.tokens.contains(tokens)
                and region.layers.contains(layers)
            ),
            None,
        )
        if found is None:
            return f"layers {layers}, heads {heads}, tokens {tokens} are not part of the plan"
        region, masks = found
        offset = tokens.begin - region.tokens.begin
        if offset % self._unit or (len(tokens) % self._unit and tokens.end != region.tokens.end):
            return f"tokens {tokens} are not cut on units of {self._unit}"
        mask = ((1 << self._units(tokens)) - 1) << (offset // self._unit)
        mine = range(layers.begin - region.layers.begin, layers.end - region.layers.begin)
        if any(masks[i] & mask for i in mine):
            return f"layers {layers}, tokens {tokens} arrived already"
        return masks, mine, mask

    def first_missing(self) -> dict[int, int]:
        """Return the first token that has not arrived, of each layer that is not complete."""
        first: dict[int, int] = {}
        for region, masks in self._regions:
            units = self._units(region.tokens)
            for layer, mask in zip(region.layers, masks, strict=True):
                arrived = (~mask & (mask + 1)).bit_length() - 1
                if arrived < units:
                    token = region.tokens.begin + arrived * self._unit
                    first[layer] = min(token, first.get(layer, token))
        return first


def kept_tokens(
    layout: KVLayout,
    tokens: Span,
    total_tokens: int,
    coverages: Iterable[Coverage],
) -> tuple[int, ...]:
    """Return what one target rank holds of a cache group when its transfer ends: `plan`'s `kept`.

    For each layer of the model, how many of the group's tokens, from the first on, are complete
    from all sources of the rank. What the plan left out counts as held: tokens before the
    transfer's `tokens` or `kept`, behind a window, of other cp shares, and layers of other ranks.
    So the ranks of one instance are joined by the smaller number (`kept_by_all`).
    """
    part, _ = layout.group_tokens(tokens, total_tokens)
    kept = [part.end] * layout.shape.layers
    for coverage in coverages:
        for layer, token in coverage.first_missing().items():
            kept[layer] = min(kept[layer], token)
    return tuple(kept)


def kept_by_all(of_ranks: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Join what each of an instance's target ranks holds of a group; () where there are none."""
    return tuple(min(of_layer) for of_layer in zip(*of_ranks, strict=True))
