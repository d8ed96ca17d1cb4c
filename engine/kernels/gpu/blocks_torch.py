"""What `blocks` does, in torch's operators. Legend: as there."""

from torch import Tensor


def copy_blocks(target: Tensor, source: Tensor, layers: range, blocks_U: Tensor) -> None:
    """Copy blocks of some layers between memories of one shape, [L, C, B, ...]."""
    part = slice(layers.start, layers.stop)
    target[part, :, blocks_U.long()] = source[part, :, blocks_U.long()]
