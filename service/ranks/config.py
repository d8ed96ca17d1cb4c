"""Settings of an instance that may have several ranks; imports nothing heavy."""

from collections.abc import Mapping
from math import prod

from pydantic import Field

from service.instance_config import InstanceConfig


class RanksConfig(InstanceConfig):
    """What both roles take; each adds the ways of splitting that are its own."""

    tp: int = Field(
        default=1, ge=1, le=1024, description="Ranks that the model's matrices are split over."
    )
    pp: int = Field(
        default=1, ge=1, le=1024, description="Stages that the model's layers are split over."
    )

    @property
    def role(self) -> str:
        """The package whose `member` module other ranks run."""
        raise NotImplementedError

    @property
    def axes(self) -> Mapping[str, int]:
        """The ways in which ranks differ, and their degrees; the last changes fastest."""
        raise NotImplementedError

    @property
    def layout_options(self) -> Mapping[str, int | bool]:
        """What the ranks' layouts (engine.parallel.Layout) have besides the axes."""
        return {}

    @property
    def ranks(self) -> int:
        """Processes that make up the instance."""
        return prod(self.axes.values())

    @property
    def rank_threads(self) -> int:
        """Threads that each rank computes with: the given number, or its part of the default."""
        given = "threads" in self.model_fields_set
        return self.threads if given else max(1, self.threads // self.ranks)
