"""Which part of a box is done: exact bookkeeping of tokens per layer.

Pure. `Ready` is the sender's side (what compute has finished and may be sent); `Coverage` is the
receiver's (what has arrived, each element exactly once).
"""

from collections.abc import Iterable

from kvtransfer.layout import Span
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
    """What has arrived of the regions that one source rank has to send."""

    def __init__(self, regions: Iterable[Region], unit: int) -> None:
        self._unit = unit
        self._regions = [(region, [0] * len(region.layers)) for region in regions]
        self.missing_units = sum(
            len(region.layers) * self._units(region.tokens) for region, _ in self._regions
        )

    def _units(self, tokens: Span) -> int:
        return -(-len(tokens) // self._unit)

    def take(self, layers: Span, heads: Span, tokens: Span) -> str | None:
        """Mark a box as arrived, or return why it must be refused; nothing changes then."""
        for region, masks in self._regions:
            if region.heads == heads and region.tokens.contains(tokens):
                if not region.layers.contains(layers):
                    continue
                return self._mark(region, masks, layers, tokens)
        return f"layers {layers}, heads {heads}, tokens {tokens} are not part of the plan"

    def _mark(self, region: Region, masks: list[int], layers: Span, tokens: Span) -> str | None:
        offset = tokens.begin - region.tokens.begin
        if offset % self._unit or (len(tokens) % self._unit and tokens.end != region.tokens.end):
            return f"tokens {tokens} are not cut on units of {self._unit}"
        mask = ((1 << self._units(tokens)) - 1) << (offset // self._unit)
        mine = range(layers.begin - region.layers.begin, layers.end - region.layers.begin)
        if any(masks[i] & mask for i in mine):
            return f"layers {layers}, tokens {tokens} arrived already"
        for i in mine:
            masks[i] |= mask
        self.missing_units -= len(layers) * self._units(tokens)
        return None
