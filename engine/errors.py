"""The errors of the engine: one tree, so that a caller can catch all of them at its edge."""

from pathlib import Path


class EngineError(Exception):
    """Base of everything the engine raises about its input or its resources."""


class ConfigError(EngineError):
    """A model folder's configuration is missing, malformed or not supported."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class WeightError(EngineError):
    """A weight file or one of its tensors is missing, damaged or of the wrong shape."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class UnsupportedError(EngineError):
    """A layout or device that this engine does not run on."""


class BatchError(EngineError, ValueError):
    """A chunk handed to the runner cannot be run: no tokens, or ids outside their range."""


class SamplingError(EngineError, ValueError):
    """A sampling or stop parameter is outside its range."""

    def __init__(self, field: str, found: object, expected: str) -> None:
        super().__init__(f"{field} is {found!r}; it must be {expected}")
        self.field = field


class BlockError(EngineError):
    """Base of the block pool's errors."""


class OutOfBlocks(BlockError):
    """More blocks were asked for than are free."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} blocks needed, {free} free")
        self.needed = needed
        self.free = free


class BlockStateError(BlockError):
    """A block is not in the state that the call needs; nothing was changed."""


class BlockPoolCorruptError(BlockError):
    """The pool's books do not agree with each other."""
