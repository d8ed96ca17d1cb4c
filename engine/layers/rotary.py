"""Rotary position embedding. Source: Su et al. 2021, arXiv 2104.09864; half-split as Qwen's.

Legend: T tokens, N heads, H head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.rope import Rope

_PIECE = 1024  # positions whose angles are computed together


@dataclass(frozen=True)
class Angles:
    """Cosines and signed sines of a pass's positions, [T, 1, H] in fp32.

    Both are multiplied by the rope's amplitude.
    """

    cos_T1H: Tensor
    sin_T1H: Tensor

    def of(self, rows_S: Tensor) -> "Angles":
        """Return the angles of some of the tokens."""
        return Angles(self.cos_T1H.index_select(0, rows_S), self.sin_T1H.index_select(0, rows_S))


class Rotary:
    """Gives the angles of a pass, once for all layers.

    They are those of a table, which grows piece by piece: reading it takes less than computing
    them again, and what torch makes of a number differs by where in a register it is.
    """

    def __init__(self, head_size: int, rope: Rope, device: torch.device) -> None:
        exponents = torch.arange(0, head_size, 2, device=device).float() / head_size
        factors = torch.tensor(rope.factors(head_size), device=device)
        self._frequencies = 1.0 / rope.theta**exponents * factors
        self._amplitude = rope.amplitude
        self._table = self._piece(0)

    def angles(self, positions_T: Tensor, end: int) -> Angles:
        """Return the angles of tokens at these positions in their sequences, all below `end`.

        From any thread: each grows the table that it has seen, and the last one's is kept.
        """
        table = self._table
        known = len(table.cos_T1H)
        if end > known:
            # Doubled at least, so that growing stays a small part of all that is computed.
            pieces = [table, *map(self._piece, range(known, max(end, 2 * known), _PIECE))]
            table = self._table = Angles(
                torch.cat([piece.cos_T1H for piece in pieces]),
                torch.cat([piece.sin_T1H for piece in pieces]),
            )
        return table.of(positions_T)

    def _piece(self, first: int) -> Angles:
        positions_T = torch.arange(first, first + _PIECE, device=self._frequencies.device)
        angles = positions_T[:, None, None].float() * self._frequencies
        cos, sin = angles.cos() * self._amplitude, angles.sin() * self._amplitude
        return Angles(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
