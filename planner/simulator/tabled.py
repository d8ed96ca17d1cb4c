"""Times that are looked up. Owns a table of what a simulator asks for again and again."""

from collections.abc import Sequence
from functools import lru_cache

from planner.costs import Chunk, Costs

_KEPT = 1 << 16


class TabledCosts:
    """Another's times, those of decode steps between the points of a table.

    A step's time grows evenly with what is cached, but for where arithmetic becomes shorter than
    memory's part; points are at powers of two of a sequence's mean tokens, and times between them
    on the line from one to the next.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._lines: dict[tuple[int, int], tuple[float, float, float]] = {}
        self._transfer_s = lru_cache(_KEPT)(costs.transfer_s)
        self._prefill_s = lru_cache(_KEPT)(costs.prefill_s)
        self._busy_s = lru_cache(_KEPT)(costs.prefill_busy_s)

    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        """See Costs."""
        return self._prefill_s(tuple(chunks))

    def prefill_busy_s(self, chunks: Sequence[Chunk]) -> float:
        """See Costs."""
        return self._busy_s(tuple(chunks))

    def decode_step_s(self, batch: int, context_tokens: float) -> float:
        """See Costs."""
        octave = int(context_tokens / batch).bit_length()
        line = self._lines.get((batch, octave))
        if line is None:
            line = self._lines[batch, octave] = self._line(batch, octave)
        low, at_low_s, token_s = line
        return at_low_s + token_s * (context_tokens - low)

    def _line(self, batch: int, octave: int) -> tuple[float, float, float]:
        low = batch * ((1 << octave) >> 1)
        high = batch << octave
        at_low_s = self._costs.decode_step_s(batch, low)
        return low, at_low_s, (self._costs.decode_step_s(batch, high) - at_low_s) / (high - low)

    def mixed_step_s(self, chunks: Sequence[Chunk], batch: int, context_tokens: float) -> float:
        """See Costs."""
        return self._costs.mixed_step_s(chunks, batch, context_tokens)

    def transfer_s(self, tokens: int) -> float:
        """See Costs."""
        return self._transfer_s(tokens)
