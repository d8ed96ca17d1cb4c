"""Cache memory that other processes of one host may map and read.

Owns the memory file, its seals and the lease words in its first pages. Knows nothing of blocks or
of transfers: what a lease stands for is the agents' business.

A reader copies at its own pace, so the owner may have given the blocks to another sequence before
the copy ends. A lease word tells: the owner sets it before it names blocks to the reader and
clears it before it lets them go, so a copy after which the word still stands copied what was
meant (a seqlock's reading side: Lameter, "Effective synchronization on Linux/NUMA systems", 2005).
"""

import fcntl
import mmap
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

MAX_LEASES = 8192
_LEASE_BYTES = MAX_LEASES * 8
_NAME = "twinpool-kv-"
NAME_BYTES = 44
BOOT_ID_BYTES = 16
_NOW = mmap.MAP_SHARED | mmap.MAP_POPULATE
# The file can neither shrink under a reader, which would kill it, nor have its seals changed.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class NotMappable(Exception):
    """The memory cannot be reached from this process; the message says why."""


@dataclass(frozen=True, kw_only=True)
class ShareHandle:
    """Where another process of the host finds the memory: only ever sent over the control lane."""

    boot_id: bytes
    pid: int
    descriptor: int
    size: int
    name: str


@dataclass(frozen=True, slots=True)
class Lease:
    """One transfer's word: `value` stands at `index` for as long as its blocks are held."""

    index: int
    value: int


class SharedRegion:
    """A sealed memory file: lease words, then the tensors allocated from it, in order."""

    def __init__(self) -> None:
        """Make the file; raises OSError where the kernel has no memory files."""
        self._name = _NAME + secrets.token_hex(16)
        self._fd = os.memfd_create(self._name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._size = 0
        self._sealed = False
        self._offsets: dict[int, int] = {}
        self._words: npt.NDArray[np.uint64] = np.frombuffer(self._map(_LEASE_BYTES), np.uint64)
        self._free = list(range(MAX_LEASES))
        self._value = secrets.randbits(62)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a zeroed tensor in the file, page-aligned; not any more once a handle was given.

        Raises OSError where there is no memory.
        """
        count = int(np.prod(shape))
        offset = self._size
        mapped = self._map(count * dtype.itemsize)
        tensor = torch.frombuffer(mapped, dtype=dtype, count=count).view(*shape)
        self._offsets[tensor.data_ptr()] = offset
        return tensor

    def offset_of(self, tensor: torch.Tensor) -> int:
        """Return where in the file a tensor from `allocate` begins; ValueError for another one."""
        if tensor.data_ptr() not in self._offsets or not tensor.is_contiguous():
            raise ValueError("the tensor was not allocated from this region")
        return self._offsets[tensor.data_ptr()]

    def _map(self, size: int) -> mmap.mmap:
        if self._sealed:
            raise ValueError("the region has been handed out: nothing more can be allocated")
        length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self._fd, self._size + length)
        # The whole of it now: a first touch costs more than the copy it would come in the midst of,
        # and too little memory is better found at the start.
        mapped = mmap.mmap(self._fd, length, flags=_NOW, offset=self._size)
        self._size += length
        return mapped

    @property
    def handle(self) -> ShareHandle:
        """What a reader needs; seals the file."""
        if not self._sealed:
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._sealed = True
        return ShareHandle(
            boot_id=boot_id(),
            pid=os.getpid(),
            descriptor=self._fd,
            size=self._size,
            name=self._name,
        )

    def lease(self) -> Lease:
        """Set a word that no lease had before; raises ValueError where all are taken."""
        if not self._free:
            raise ValueError(f"{MAX_LEASES} leases are taken")
        self._value += 1
        lease = Lease(self._free.pop(), self._value)
        self._words[lease.index] = lease.value
        return lease

    def end(self, lease: Lease) -> None:
        """Clear a lease's word: from here on no copy under it counts."""
        self._words[lease.index] = 0
        self._free.append(lease.index)

    @property
    def leases(self) -> int:
        """Number of leases that stand."""
        return MAX_LEASES - len(self._free)

    def close(self) -> None:
        """Close the file; tensors and readers' mappings live on until they are dropped."""
        os.close(self._fd)


class MappedRegion:
    """Another process's region, read-only."""

    def __init__(self, handle: ShareHandle) -> None:
        """Map it; raises NotMappable for one of another host, another user or another kind."""
        if handle.boot_id != boot_id():
            raise NotMappable("the peer is on another host")
        if not handle.name.startswith(_NAME) or handle.size < _LEASE_BYTES:
            raise NotMappable("the peer's memory has no name or size of ours")
        path = Path(f"/proc/{handle.pid}/fd/{handle.descriptor}")
        try:
            if path.readlink().name != f"memfd:{handle.name} (deleted)":
                raise NotMappable("the peer's memory is not in this process namespace")
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise NotMappable(f"the peer's memory cannot be opened: {exc.strerror}") from exc
        try:
            self._map = _mapped(descriptor, handle.size)
        finally:
            os.close(descriptor)
        self._words: npt.NDArray[np.uint64] = np.frombuffer(self._map, np.uint64, count=MAX_LEASES)
        self.size = handle.size

    def stands(self, lease: Lease) -> bool:
        """Whether the owner still holds what the lease is for."""
        return int(self._words[lease.index]) == lease.value

    def array(self, offset: int, shape: Sequence[int], dtype: type[np.generic]) -> npt.NDArray[Any]:
        """Return a read-only view; raises ValueError where it would reach beyond the file."""
        count = int(np.prod(shape))
        if offset < _LEASE_BYTES or offset + count * np.dtype(dtype).itemsize > self.size:
            raise ValueError("the peer's cache reaches beyond the memory it shares")
        return np.frombuffer(self._map, dtype, count=count, offset=offset).reshape(shape)

    def bytes(self, size: int) -> npt.NDArray[np.uint8]:
        """Return the first `size` bytes."""
        return np.frombuffer(self._map, np.uint8, count=size)


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    if seals & _SEALS != _SEALS or os.fstat(descriptor).st_size != size:
        raise NotMappable("the peer's memory is not sealed, or of another size than it says")
    return mmap.mmap(descriptor, size, flags=_NOW, prot=mmap.PROT_READ)


def boot_id() -> bytes:
    """Return 16 bytes that tell this boot of this host from all others."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text()
    return bytes.fromhex(text.strip().replace("-", ""))
