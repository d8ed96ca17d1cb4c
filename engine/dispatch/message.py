"""Token rows with numbers beside them, as bytes: one message instead of several.

Legend: R rows, N numbers of a row, D hidden size, B bytes of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 16


@dataclass(frozen=True)
class RowFormat:
    """A row: `numbers` numbers of four bytes each, then `hidden` elements of `dtype`."""

    numbers: int
    hidden: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in a message; some may be unused."""
        return self._begin + _aligned(self.hidden * self.dtype.itemsize)

    @property
    def _begin(self) -> int:
        return _aligned(4 * self.numbers)

    def pack(self, x_RD: Tensor, *numbers: Tensor) -> Tensor:
        """Return the message, [R, B]; `numbers` are int32 or fp32, [R, .], N in all."""
        message_RB = torch.empty(len(x_RD), self.row_bytes, dtype=torch.uint8, device=x_RD.device)
        begin = 0
        for each in numbers:
            end = begin + 4 * each.shape[1]
            message_RB[:, begin:end].view(each.dtype).copy_(each)
            begin = end
        self._rows(message_RB).copy_(x_RD)
        return message_RB

    def unpack(self, message_RB: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows, [R, D], and their numbers as int32, [R, N]: views of the message."""
        numbers_RN = message_RB[:, : 4 * self.numbers].view(torch.int32)
        return self._rows(message_RB), numbers_RN

    def _rows(self, message_RB: Tensor) -> Tensor:
        end = self._begin + self.hidden * self.dtype.itemsize
        return message_RB[:, self._begin : end].view(self.dtype)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
