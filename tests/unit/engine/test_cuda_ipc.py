"""A GPU's memory lent and borrowed, by a driver that stands in for CUDA's.

What a GPU's own driver does with it is seen where there is one (tests/integration/test_apart.py).
"""

import sys
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import cuda_ipc


class Result(IntEnum):
    """As the driver's."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_MAP_FAILED = 205


class Driver:
    """The calls that are made of cuda.bindings.driver, with its arguments and answers."""

    CUipcMem_flags = SimpleNamespace(CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS=SimpleNamespace(value=1))

    def __init__(self, base: int) -> None:
        self.CUresult = Result
        self.base = base
        self.error = Result.CUDA_SUCCESS
        self.closed: list[int] = []

    def CUipcMemHandle(self) -> Any:
        return SimpleNamespace(reserved=bytes(64))

    def cuMemGetAddressRange(self, pointer: int) -> tuple[Result, int, int]:
        assert pointer >= self.base
        return self.error, self.base, 1 << 30

    def cuIpcGetMemHandle(self, pointer: int) -> tuple[Result, Any]:
        assert pointer == self.base
        return self.error, SimpleNamespace(reserved=b"handle".ljust(64, b"."))

    def cuIpcOpenMemHandle(self, handle: Any, flags: int) -> tuple[Result, int]:
        assert handle.reserved == b"handle".ljust(64, b".")
        assert flags == 1
        return self.error, 5000

    def cuIpcCloseMemHandle(self, pointer: int) -> tuple[Result]:
        self.closed.append(pointer)
        return (self.error,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver(base=torch.zeros(1).data_ptr() & ~0xFFF)
    monkeypatch.setattr(cuda_ipc, "_driver", lambda device: made)
    return made


def test_a_tensor_is_opened_where_it_begins_in_its_allocation(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = torch.zeros(10, dtype=torch.bfloat16)
    driver.base = memory.data_ptr() - 64
    lent = cuda_ipc.lend(memory)
    opened: list[Any] = []

    def as_tensor(made: object, device: torch.device) -> None:
        opened.append(made)

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    cuda_ipc.borrow(lent, torch.device("cuda"))
    described = opened[0].__cuda_array_interface__
    assert described["data"] == (5000 + 64, False)
    assert (described["shape"], described["typestr"]) == ((20,), "|u1")
    opened.clear()
    assert driver.closed == [5000]


def test_what_the_driver_refuses_is_said(driver: Driver) -> None:
    memory = torch.zeros(10)
    driver.base = memory.data_ptr()
    lent = cuda_ipc.lend(memory)
    driver.error = Result.CUDA_ERROR_MAP_FAILED
    for refused in (lambda: cuda_ipc.lend(memory), lambda: cuda_ipc.borrow(lent, memory.device)):
        with pytest.raises(OSError, match="cannot be shared: CUDA_ERROR_MAP_FAILED"):
            refused()
    with pytest.raises(OSError, match="no handle"):
        cuda_ipc.borrow(lent[1:], memory.device)


def test_missing_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(OSError, match="needs the package cuda-bindings"):
        cuda_ipc.lend(torch.zeros(1))
