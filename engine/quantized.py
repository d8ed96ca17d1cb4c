"""Weights that checkpoints hold in fp8, and how they become numbers to compute with.

Owns the arithmetic of the format that DeepSeek-V3 was published in (arXiv 2412.19437, section 3.3):
a tensor in e4m3, and beside it an fp32 factor for each square of 128 x 128 of its elements, under
the tensor's name and "_scale_inv". Reads no files.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.checkpoint import TensorInfo
from engine.errors import WeightError

FP8 = "F8_E4M3"
BLOCK = 128
_SUFFIX = "_scale_inv"


def is_scale(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether this is the factors of another tensor of the checkpoint."""
    return name.endswith(_SUFFIX) and name.removesuffix(_SUFFIX) in tensors


def scale_of(tensor: TensorInfo, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """Return a tensor's factors; None where it has none. Raises WeightError for wrong ones."""
    if tensor.dtype != FP8:
        return None
    name = tensor.name + _SUFFIX
    squares = tuple(-(-size // BLOCK) for size in tensor.shape)
    scale = tensors.get(name)
    if scale is None or scale.shape != squares or scale.dtype != "F32":
        found = "missing" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise WeightError(
            tensor.file,
            f"{tensor.name} is in fp8, but {name} is {found}; it must be F32 {list(squares)}, a "
            f"factor for each square of {BLOCK} x {BLOCK}",
        )
    return scale


def widened(part: Tensor, scale: Tensor, where: Sequence[slice]) -> Tensor:
    """Return part of a tensor in fp32, which lies at `where` in the whole; `scale` is the whole's.

    Dimensions that `where` leaves out are whole.
    """
    wide = part.float()
    for axis, size in enumerate(part.shape):
        start = (where[axis].start or 0) if axis < len(where) else 0
        places = torch.arange(start, start + size) // BLOCK
        scale = scale.index_select(axis, places)
    return wide.mul_(scale)
