"""Settings of a decode instance; imports nothing heavy."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from service.ranks.config import RanksConfig


class DecodeConfig(RanksConfig):
    """What `twinpool decode` takes."""

    dp: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Groups of --tp ranks (times --pp) that each have sequences of their own;"
        " --ep spreads experts over all of them.",
    )
    ep: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Parts into which a sparse model's experts are split over the --tp x --dp"
        " ranks; each expert is split over what is left of them.",
    )
    dispatch: Literal["auto", "alltoall", "padded", "allgather"] = Field(
        default="auto",
        description="How tokens get to experts on other ranks; auto measures at the start.",
    )
    redundant_experts: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Experts that each of the --ep parts has beside its even share: room for more"
        " copies of those that get much.",
    )
    balance_interval_s: float = Field(
        default=30.0,
        ge=0,
        description="Seconds after which experts change places, where that spreads the tokens of"
        " these seconds better over --ep; 0 leaves them where they are.",
    )
    max_batch: int = Field(
        default=64, ge=1, description="Sequences that one step works on at most, times --dp."
    )
    max_sequences: int = Field(
        default=256, ge=1, description="Sequences held at once, reserved or running."
    )
    kv_overcommit: int | None = Field(
        default=None,
        ge=1,
        description="Output tokens that a request is thought to have: more blocks are taken only"
        " when needed. By default all of its max_new_tokens are reserved.",
    )
    local_prefill_tokens: int = Field(
        default=32,
        ge=0,
        description="Prompt tokens that a step of a dp rank computes at most, of short or mostly"
        " cached prompts that a router has computed here; 0 takes none of them.",
    )
    colocated: bool = Field(
        default=False,
        description="Compute the prompts of all requests here, in chunks beside other tokens: such"
        " instances are all that their router needs.",
    )
    chunk_tokens: int = Field(
        default=512,
        ge=1,
        description="With --colocated, tokens of a step of a dp rank at most: one for each sequence"
        " that runs, then prompts'. More is sooner for prompts, fewer for the others.",
    )
    prefix_cache: bool = Field(
        default=True,
        description="Keep the KV of ended sequences while there is room, for prompts that begin"
        " alike.",
    )
    data_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Port to take KV data on, the first of --tp x --pp x --dp; 0 takes free ones.",
    )

    @model_validator(mode="after")
    def _can_be_deterministic(self) -> Self:
        moves = self.ep > 1 and self.balance_interval_s > 0
        if self.deterministic and moves and self.dispatch == "allgather":
            raise ValueError(
                "--deterministic: found --dispatch allgather, which adds up by where experts are,"
                " and --balance-interval-s, which moves them; use --dispatch alltoall or padded,"
                " or --balance-interval-s 0"
            )
        return self

    @model_validator(mode="after")
    def _has_one_bound_on_prompts(self) -> Self:
        if self.colocated and "local_prefill_tokens" in self.model_fields_set:
            raise ValueError(
                f"--local-prefill-tokens: found {self.local_prefill_tokens} with --colocated, where"
                " --chunk-tokens is the bound; leave it out"
            )
        if not self.colocated and "chunk_tokens" in self.model_fields_set:
            raise ValueError(
                f"--chunk-tokens: found {self.chunk_tokens} without --colocated; add that, or set"
                " --local-prefill-tokens"
            )
        if self.colocated and self.chunk_tokens <= self.max_batch:
            raise ValueError(
                f"--chunk-tokens: found {self.chunk_tokens}, which the sequences of --max-batch"
                f" {self.max_batch} may take alone; raise it, or lower --max-batch"
            )
        return self

    @property
    def prompt_tokens(self) -> int:
        """Of prompts, in a step of a dp rank at most; 0: none are computed here."""
        return self.chunk_tokens if self.colocated else self.local_prefill_tokens

    @property
    def role(self) -> str:
        """See RanksConfig."""
        return "decode"

    @property
    def axes(self) -> Mapping[str, int]:
        """See RanksConfig."""
        return {"dp": self.dp, "pp": self.pp, "tp": self.tp}

    @property
    def layout_options(self) -> Mapping[str, int | bool]:
        """See RanksConfig."""
        return {"ep": self.ep}

    def dp_ranks(self, dp_rank: int) -> range:
        """The ranks that a sequence of a dp rank is on."""
        each = self.ranks // self.dp
        return range(dp_rank * each, (dp_rank + 1) * each)
