"""Boxes of a GPU's cached keys and values: copied to another cache, or to the host and back.

For transfers that read and write the cache itself. Owns a stream beside the passes; a copy is over
when it returns. Shapes are those of engine.kernels.gpu.pack: a cache is [L, C, B, G, P, H], a
payload [L, C, U, N, Q, H].
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine import cuda_ipc
from engine.kernels.gpu.options import Units
from engine.kernels.table import paged_kernels

# Of each unit its block and its part of it; and the heads.
Box = tuple[NDArray[np.int64], NDArray[np.int64], slice]


class Boxes:
    """Copies of one device; from one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._move = paged_kernels(device).move
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, cache: Tensor) -> None:
        """Copy a block each way, so that no transfer waits for a compiler: the cache is empty."""
        first = np.zeros(1, np.int64)
        box = first, first, slice(0, cache.shape[3])
        unit = cache.shape[4]
        payload = torch.zeros_like(cache[:1, :, :1], device="cpu")
        self.pack(payload, cache[:1], box, unit, unit)
        self.unpack(cache[:1], payload, box, unit, unit)
        self.copy(cache[:1], cache[:1], box, box, unit, unit)

    def copy(self, into: Tensor, source: Tensor, to: Box, at: Box, unit: int, tokens: int) -> None:
        """Copy a box between caches, of which one may be another process's."""
        with self._apart():
            self._move(into, source, self._units(to), self._units(at), unit, tokens)

    def pack(self, payload: Tensor, cache: Tensor, at: Box, unit: int, tokens: int) -> None:
        """Copy a box to a payload in the host's memory; what lies behind its tokens is zero."""
        with self._apart():
            staged = torch.empty(payload.shape, dtype=payload.dtype, device=self._device)
            self._move(staged, cache, None, self._units(at), unit, tokens)
            payload.copy_(staged)

    def unpack(self, cache: Tensor, payload: Tensor, to: Box, unit: int, tokens: int) -> None:
        """Copy a payload in the host's memory to its box; zeros come behind its tokens."""
        with self._apart():
            self._move(cache, payload.to(self._device), self._units(to), None, unit, tokens)

    def clear(self, part: Tensor) -> None:
        """Make a part of a cache zero."""
        with self._apart():
            part.zero_()

    def read(self, part: Tensor) -> None:
        """Read a part of a memory, to see how long that takes."""
        with self._apart():
            torch.empty(part.shape, dtype=part.dtype, device=self._device).copy_(part)

    def lend(self, cache: Tensor) -> bytes:
        """Return what another process of the host opens a cache with; raises OSError."""
        return cuda_ipc.lend(cache)

    def borrow(self, lent: bytes) -> Tensor:
        """Return what another process has lent, as bytes; raises OSError."""
        return cuda_ipc.borrow(lent, self._device)

    def _units(self, box: Box) -> Units:
        blocks, subs, heads = box
        # Each of its own: a kernel is compiled anew for an address that is not as even.
        blocks_U, subs_U = (
            torch.from_numpy(np.ascontiguousarray(each)).to(self._device) for each in (blocks, subs)
        )
        return Units(blocks_U, subs_U, heads)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
