"""Settings of a prefill instance; imports nothing heavy."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from service.ranks.config import RanksConfig


class PrefillConfig(RanksConfig):
    """What `twinpool prefill` takes."""

    max_batched_tokens: int = Field(
        default=2048,
        ge=1,
        description="Prompt tokens that one step computes at most, times --cp.",
    )
    prefix_cache: bool = Field(
        default=True,
        description="Keep the KV of prompts while there is room, for prompts that begin alike.",
    )
    max_queue: int = Field(
        default=256, ge=1, description="Requests held at once; more are refused."
    )
    cp: int = Field(
        default=1, ge=1, le=1024, description="Ranks that a prompt's tokens are split over."
    )
    pp: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Stages that the model's layers are split over; prompts flow through in chunks"
        " of --max-batched-tokens.",
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Let each of --tp ranks compute norms for a part of the tokens only.",
    )
    cp_grain: int | None = Field(
        default=None,
        ge=1,
        description="Tokens in a row that one of --cp ranks has, whole blocks; measured if unset.",
    )
    ring: Literal["auto", "pass-kv", "pass-q", "gather"] = Field(
        default="auto",
        description="What --cp ranks send each other: keys and values, queries, or all to all.",
    )

    nice: int = Field(
        default=0,
        ge=0,
        le=19,
        description="Niceness: from 1 on, decode comes first where both share cores that are too"
        " few.",
    )

    @property
    def role(self) -> str:
        """See RanksConfig."""
        return "prefill"

    @property
    def axes(self) -> Mapping[str, int]:
        """See RanksConfig."""
        return {"pp": self.pp, "cp": self.cp, "tp": self.tp}

    @property
    def layout_options(self) -> Mapping[str, int | bool]:
        """See RanksConfig."""
        grain = (self.cp_grain or 0) if self.cp > 1 else 0
        return {"cp_grain": grain, "sequence_parallel": self.sequence_parallel}

    @model_validator(mode="after")
    def _can_be_deterministic(self) -> Self:
        if self.deterministic and self.cp > 1:
            raise ValueError(
                f"--deterministic: found --cp {self.cp}; how the ring adds up attention depends on"
                " the whole step: use --cp 1"
            )
        return self

    @model_validator(mode="after")
    def _is_whole_blocks(self) -> Self:
        if (self.cp_grain or 0) % self.block_size:
            raise ValueError(
                f"--cp-grain: found {self.cp_grain}; must be a multiple of --block-size,"
                f" {self.block_size}"
            )
        return self
