"""Boxes of memory that processes of one host share, in the place of GPUs that do: engine.boxes."""

import struct
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.boxes import Boxes
from kvtransfer.shared import MappedRegion, NotMappable, SharedRegion, ShareHandle, boot_id

_LENT = struct.Struct("<IIQ44sQQ")


class LentBoxes(Boxes):
    """The CPU's, whose caches are allocated here and lent from here."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._region = SharedRegion()
        self.copied = 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See engine.kvcache.Allocate."""
        return self._region.allocate(shape, dtype)

    def copy(self, *args: object) -> None:
        """See Boxes."""
        super().copy(*args)  # type: ignore[arg-type]
        self.copied += 1

    def lend(self, cache: Tensor) -> bytes:
        """See Boxes."""
        handle, offset = self._region.handle, self._region.offset_of(cache)
        at = handle.pid, handle.descriptor, handle.size, handle.name.encode()
        return _LENT.pack(*at, offset, cache.nbytes)

    def borrow(self, lent: bytes) -> Tensor:
        """See Boxes."""
        pid, descriptor, whole, name, offset, size = _LENT.unpack(lent)
        handle = ShareHandle(
            boot_id=boot_id(), pid=pid, descriptor=descriptor, size=whole, name=name.decode()
        )
        try:
            region = MappedRegion(handle)
        except NotMappable as exc:
            raise OSError(str(exc)) from exc
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(region.array(offset, (size,), np.uint8))
