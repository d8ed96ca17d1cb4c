"""Rotary position embedding. Source: Su et al. 2021, arXiv 2104.09864; half-split as Qwen's.

Legend: T tokens, N heads, H head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Angles:
    """Cosines and signed sines of a pass's positions, [T, 1, H] in fp32."""

    cos_T1H: Tensor
    sin_T1H: Tensor

    def of(self, rows_S: Tensor) -> "Angles":
        """Return the angles of some of the tokens."""
        return Angles(self.cos_T1H[rows_S], self.sin_T1H[rows_S])


class Rotary:
    """Makes the angles of a pass, once for all layers."""

    def __init__(self, head_size: int, theta: float, device: torch.device) -> None:
        exponents = torch.arange(0, head_size, 2, device=device).float() / head_size
        self._frequencies = 1.0 / theta**exponents

    def angles(self, positions_T: Tensor) -> Angles:
        """Return the angles of tokens at these positions in their sequences."""
        angles = positions_T[:, None, None].float() * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        return Angles(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
