"""The one loop that Python is too slow for, compiled where the machine has a C compiler.

Owns the foreign functions' types. Without a compiler everything works as well, a copy of many runs
with checksums takes up to twice as long.
"""

import ctypes
import functools
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from native import NativeError, load

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]


class Runs(NamedTuple):
    """Contiguous arrays: where runs go to, where they come from, and their bytes."""

    into: Ints
    out: Ints
    sizes: Ints


_SOURCE = Path(__file__).with_name("copy_runs.c")


class Loop:
    """copy_runs.c, which checks nothing of what it is given."""

    def __init__(self, library: ctypes.CDLL) -> None:
        arrays = (ctypes.c_void_p,) * 5 + (ctypes.c_size_t,)
        self._copy = library.twinpool_copy_runs
        self._copy.argtypes, self._copy.restype = arrays, None
        # Whether the processor takes a crc32 on the way.
        self.can_crc = bool(library.twinpool_can_crc())
        if self.can_crc:
            self._copy_crc = library.twinpool_copy_runs_crc
            self._copy_crc.argtypes = (*arrays, ctypes.c_uint32)
            self._copy_crc.restype = ctypes.c_uint32
            self._crc = library.twinpool_crc_runs
            self._crc.argtypes = (*arrays[:3], ctypes.c_size_t, ctypes.c_uint32)
            self._crc.restype = ctypes.c_uint32

    def copy(self, target: memoryview, source: memoryview, runs: Runs) -> None:
        """Copy runs."""
        self._copy(*_addresses(target, source, runs), len(runs.sizes))

    def copy_crc(self, target: memoryview, source: memoryview, runs: Runs, crc: int) -> int:
        """Copy runs; return `crc` continued over their bytes as they were copied."""
        return int(self._copy_crc(*_addresses(target, source, runs), len(runs.sizes), crc))

    def crc(self, source: memoryview, out: Ints, sizes: Ints, crc: int) -> int:
        """Return `crc` continued over runs."""
        at = np.frombuffer(source, np.uint8).ctypes.data
        return int(self._crc(at, out.ctypes.data, sizes.ctypes.data, len(sizes), crc))


def _addresses(target: memoryview, source: memoryview, runs: Runs) -> tuple[int, ...]:
    to, at = (np.frombuffer(memory, np.uint8).ctypes.data for memory in (target, source))
    return (to, at, runs.into.ctypes.data, runs.out.ctypes.data, runs.sizes.ctypes.data)


@functools.cache
def loop() -> Loop | None:
    """Return the compiled loop, or None where there can be none.

    Compiled at the first call on a machine, then kept in the user's cache folder.
    """
    try:
        return Loop(load(_SOURCE, frozenset()))
    except NativeError as exc:
        logger.info("KV is copied without a compiled loop: %s", exc)
        return None
