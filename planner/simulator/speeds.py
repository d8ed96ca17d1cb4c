"""Times from measured speeds: so much for a step, for each sequence, for each token. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.costs import Chunk
from service.step_fit import StepSpeed


@dataclass(frozen=True, kw_only=True)
class SpeedCosts:
    """See `planner.costs.Costs`. Of prefill's steps `sequence_s` is for each prompt.

    A step that has both takes as long as a decode step and the tokens of its pieces.
    """

    prefill: StepSpeed
    decode: StepSpeed
    latency_s: float = 0.0
    transfer_token_s: float = 0.0

    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        """See Costs."""
        tokens = sum(chunk.tokens for chunk in chunks)
        speed = self.prefill
        return speed.base_s + len(chunks) * speed.sequence_s + tokens * speed.token_s

    def prefill_busy_s(self, chunks: Sequence[Chunk]) -> float:
        """See Costs."""
        return self.prefill_s(chunks)

    def decode_step_s(self, batch: int, context_tokens: float) -> float:
        """See Costs."""
        speed = self.decode
        return speed.base_s + batch * speed.sequence_s + context_tokens * speed.token_s

    def mixed_step_s(self, chunks: Sequence[Chunk], batch: int, context_tokens: float) -> float:
        """See Costs."""
        tokens = sum(chunk.tokens for chunk in chunks)
        return self.decode_step_s(batch, context_tokens) + tokens * self.prefill.token_s

    def transfer_s(self, tokens: int) -> float:
        """See Costs."""
        return self.latency_s + tokens * self.transfer_token_s
