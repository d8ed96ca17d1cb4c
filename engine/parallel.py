"""How an instance splits a model over ranks. Owns the arithmetic of shards, no processes.

Layers ask the layout which part of a dimension is theirs, so that tensor and expert
parallelism need no change in a layer's interface. One rank for now.
"""

from dataclasses import dataclass, fields

from engine.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of tensor, pipeline, context, expert and data parallelism; all must be 1 for now."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            degree = getattr(self, field.name)
            if degree != 1:
                raise UnsupportedError(
                    f"{field.name}={degree}: this engine runs on one rank; use {field.name}=1"
                )

    def tensor_part(self, size: int) -> slice:
        """Return which of `size` rows, columns or heads this rank holds."""
        return slice(0, size // self.tp)

    def expert_part(self, experts: int) -> slice:
        """Return which of `experts` this rank holds."""
        return slice(0, experts // self.ep)
