"""Owns what is known of a simulated request: what was asked, and what became of it."""

import math
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Call:
    """One request; moments are in virtual seconds.

    Attributes:
        refused: Why it was not served to its end, where it was not.
        tokens: Those of its answer that lost instances had given.
        moves: How often it went on elsewhere.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    first_at: float = math.nan
    ended_at: float = math.nan
    refused: str = ""
    tokens: int = 0
    moves: int = 0

    @property
    def is_finished(self) -> bool:
        """Whether it was answered to its end."""
        return not math.isnan(self.ended_at)

    @property
    def has_begun(self) -> bool:
        """Whether it has had its first token."""
        return not math.isnan(self.first_at)

    @property
    def ttft_s(self) -> float:
        """Arrival to first token."""
        return self.first_at - self.at_s

    @property
    def tpot_s(self) -> float:
        """Time for each token after the first; 0 where there is none, which keeps any limit."""
        if self.output_tokens == 1:
            return 0.0
        return (self.ended_at - self.first_at) / (self.output_tokens - 1)

    def keeps(self, ttft_s: float, tpot_s: float) -> bool:
        """Tell whether it was answered to its end within both limits."""
        return self.is_finished and self.ttft_s <= ttft_s and self.tpot_s <= tpot_s
