"""The errors of attention over several ranks."""

from engine.errors import EngineError


class RingError(EngineError, ValueError):
    """Shards or tensors handed to the ring do not fit together."""


class CommError(EngineError):
    """A message between ranks did not arrive or could not be sent; the group is of no more use."""
