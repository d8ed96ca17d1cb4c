"""A GPU's memory, opened by another process of the same host. Source: CUDA driver API, section IPC.

Owns the handles. The memory stays its owner's: whoever has opened it may read what the owner says
is there, and for as long as the owner lives.
"""

import importlib
import struct
from typing import Any

import torch
from torch import Tensor

# The handle of an allocation, and where in it a tensor begins and how long it is.
_LENT = struct.Struct("<64sQQ")


def lend(memory: Tensor) -> bytes:
    """Return what another process opens a contiguous tensor with.

    Raises OSError where the memory is of a kind that cannot be shared.
    """
    driver = _driver(memory.device)
    base, _ = _checked(driver, driver.cuMemGetAddressRange(memory.data_ptr()))
    (handle,) = _checked(driver, driver.cuIpcGetMemHandle(base))
    return _LENT.pack(bytes(handle.reserved), memory.data_ptr() - int(base), memory.nbytes)


def borrow(lent: bytes, device: torch.device) -> Tensor:
    """Return another process's tensor as bytes that `device` reaches; it is closed with the tensor.

    Raises OSError where it cannot be opened: its owner is of another host or in another namespace,
    or its GPU is out of reach of this one.
    """
    if len(lent) != _LENT.size:
        raise OSError(f"{len(lent)} bytes are no handle of a GPU's memory")
    reserved, offset, size = _LENT.unpack(lent)
    driver = _driver(device)
    handle = driver.CUipcMemHandle()
    handle.reserved = reserved
    flag = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    (base,) = _checked(driver, driver.cuIpcOpenMemHandle(handle, flag.value))
    return torch.as_tensor(_Opened(driver, int(base), offset, size), device=device)


class _Opened:
    """Memory as torch takes it: a tensor made of it keeps this alive."""

    def __init__(self, driver: Any, base: int, offset: int, size: int) -> None:
        self._driver = driver
        self._base = base
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (base + offset, False),
            "strides": None,
            "version": 3,
        }

    def __del__(self) -> None:
        self._driver.cuIpcCloseMemHandle(self._base)


def _driver(device: torch.device) -> Any:
    """Return the driver's bindings, in a thread whose context is the device's."""
    try:
        driver: Any = importlib.import_module("cuda.bindings.driver")
    except ImportError as exc:
        raise OSError(
            f"sharing a GPU's memory needs the package cuda-bindings, which comes with torch for"
            f" CUDA and cannot be imported here ({exc})"
        ) from exc
    torch.cuda.synchronize(device)
    return driver


def _checked(driver: Any, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    error, *found = answer
    if error != driver.CUresult.CUDA_SUCCESS:
        raise OSError(f"the GPU's memory cannot be shared: {error.name}")
    return tuple(found)
