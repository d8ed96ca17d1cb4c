"""When a sequence ends by its tokens. Owns end tokens and lengths; stop strings are text's."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from engine.errors import SamplingError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class StopCriteria:
    """The limits of one sequence; raises SamplingError naming the field that is out of range."""

    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SamplingError("max_new_tokens", self.max_new_tokens, "at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise SamplingError(
                "min_new_tokens",
                self.min_new_tokens,
                f"between 0 and max_new_tokens, which is {self.max_new_tokens}",
            )
        for name in ("stop_token_ids", "eos_token_ids"):
            ids: Iterable[int] = getattr(self, name)
            object.__setattr__(self, name, frozenset(ids))
            if any(token_id < 0 for token_id in ids):
                raise SamplingError(name, sorted(ids), "a set of token ids from 0")

    @property
    def end_token_ids(self) -> frozenset[int]:
        """The tokens that end this sequence; they may not be sampled before min_new_tokens."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | self.eos_token_ids

    def check(self, token_id: int, output_len: int) -> FinishReason | None:
        """Return why the sequence ends with `token_id`, its `output_len`-th new token, or None."""
        if output_len >= self.min_new_tokens and token_id in self.end_token_ids:
            return "stop"
        return "length" if output_len >= self.max_new_tokens else None
