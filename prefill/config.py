"""Settings of a prefill instance; imports nothing heavy."""

from pydantic import Field

from service.instance_config import InstanceConfig


class PrefillConfig(InstanceConfig):
    """What `twinpool prefill` takes."""

    max_batched_tokens: int = Field(
        default=2048, ge=1, description="Prompt tokens that one step computes at most."
    )
    prefix_cache: bool = Field(
        default=True,
        description="Keep the KV of prompts while there is room, for prompts that begin alike.",
    )
    max_queue: int = Field(
        default=256, ge=1, description="Requests held at once; more are refused."
    )
