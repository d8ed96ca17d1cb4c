"""Rows and numbers as bytes."""

import pytest
import torch

from engine.dispatch.message import RowFormat


@pytest.mark.parametrize("hidden", [1, 5, 64])
@pytest.mark.parametrize("numbers", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_packed_is_unpacked(hidden: int, numbers: int, dtype: torch.dtype) -> None:
    x_RD = torch.randn(4, hidden).to(dtype)
    ids_RN = torch.randint(-1, 1 << 30, (4, numbers), dtype=torch.int32)
    weights_RN = torch.randn(4, numbers)
    format_ = RowFormat(2 * numbers, hidden, dtype)
    message = format_.pack(x_RD, ids_RN, weights_RN)
    assert message.shape == (4, format_.row_bytes)
    found_RD, found = format_.unpack(message)
    assert torch.equal(found_RD, x_RD)
    assert torch.equal(found[:, :numbers], ids_RN)
    assert torch.equal(found[:, numbers:].view(torch.float32), weights_RN)


def test_no_rows_are_a_message_too() -> None:
    format_ = RowFormat(2, 3, torch.bfloat16)
    message = format_.pack(torch.empty(0, 3, dtype=torch.bfloat16), torch.empty(0, 2).int())
    assert format_.unpack(message)[0].shape == (0, 3)
