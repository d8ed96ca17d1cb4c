"""How small arrays that a pass is laid out with get to its device."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def placed(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Return an array on a device; on a CPU it is the array itself.

    A GPU copies it when it comes to it: the host does not wait for the pass before, as it would for
    a copy from memory that is not locked.
    """
    tensor: Any = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor  # type: ignore[no-any-return]
    return tensor.pin_memory().to(device, non_blocking=True)  # type: ignore[no-any-return]
