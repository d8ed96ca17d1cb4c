"""Settings of a decode instance; imports nothing heavy."""

from pydantic import Field

from service.instance_config import InstanceConfig


class DecodeConfig(InstanceConfig):
    """What `twinpool decode` takes."""

    max_batch: int = Field(
        default=64, ge=1, description="Sequences that one step works on at most."
    )
    max_sequences: int = Field(
        default=256, ge=1, description="Sequences held at once, reserved or running."
    )
    data_port: int = Field(
        default=0, ge=0, le=65535, description="Port to take KV data on; 0 takes a free one."
    )
