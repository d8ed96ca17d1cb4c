"""Rotary position embedding. Source: Su et al. 2021, arXiv 2104.09864; half-split as Qwen's.

Legend: T tokens, N heads, H head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_GROWTH = 1024  # positions that a table grows by


@dataclass(frozen=True)
class Angles:
    """Cosines and signed sines of a pass's positions, [T, 1, H] in fp32."""

    cos_T1H: Tensor
    sin_T1H: Tensor

    def of(self, rows_S: Tensor) -> "Angles":
        """Return the angles of some of the tokens."""
        return Angles(self.cos_T1H[rows_S], self.sin_T1H[rows_S])

    def and_then(self, other: "Angles") -> "Angles":
        """Return these angles, and others after them."""
        return Angles(
            torch.cat((self.cos_T1H, other.cos_T1H)), torch.cat((self.sin_T1H, other.sin_T1H))
        )


class Rotary:
    """Makes the angles of a pass, once for all layers.

    With `deterministic` a position's are those of a table, which grows: what torch makes of a
    number differs by where in a register it is.
    """

    def __init__(
        self, head_size: int, theta: float, device: torch.device, *, deterministic: bool = False
    ) -> None:
        exponents = torch.arange(0, head_size, 2, device=device).float() / head_size
        self._frequencies = 1.0 / theta**exponents
        self._table: Angles | None = None
        if deterministic:
            self._table = self._computed(torch.arange(_GROWTH, device=device))

    def angles(self, positions_T: Tensor) -> Angles:
        """Return the angles of tokens at these positions in their sequences."""
        if self._table is None:
            return self._computed(positions_T)
        while len(self._table.cos_T1H) <= int(positions_T.amax() if len(positions_T) else 0):
            first = len(self._table.cos_T1H)
            more = torch.arange(first, first + _GROWTH, device=positions_T.device)
            self._table = self._table.and_then(self._computed(more))
        return self._table.of(positions_T)

    def _computed(self, positions_T: Tensor) -> Angles:
        angles = positions_T[:, None, None].float() * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        return Angles(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
