"""The one loop that Python is too slow for, compiled where the machine has a C compiler.

Owns building, keeping and loading of copy_runs.c. Without a compiler everything works as well, a
copy of many runs takes up to twice as long.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

Copy = Callable[[int, int], None]
CopyRuns = Callable[[memoryview, memoryview, npt.NDArray[np.int64]], Copy]

_SOURCE = Path(__file__).with_name("copy_runs.c")
_FLAGS = ("-O3", "-shared", "-fPIC")
_COMPILE_S = 60.0


@functools.cache
def copy_runs() -> CopyRuns | None:
    """Return a function (target, source, [3, n] offsets into, offsets out and sizes), or None.

    It returns one that copies some of these runs: (first, count). Neither checks what it is
    given. Compiled at the first call on a machine, then kept in the user's cache folder.
    """
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as exc:
        logger.info("KV is copied without a compiled loop: %s", exc)
        return None
    function = library.twinpool_copy_runs
    function.argtypes = (ctypes.c_void_p,) * 5 + (ctypes.c_size_t,)
    function.restype = None

    def prepare(target: memoryview, source: memoryview, runs: npt.NDArray[np.int64]) -> Copy:
        to, at = (np.frombuffer(each, np.uint8).ctypes.data for each in (target, source))
        held = np.ascontiguousarray(runs)
        into, out, sizes = (row.ctypes.data for row in held)

        def copy(first: int, count: int) -> None:
            skip = first * held.itemsize
            function(to, at, into + skip, out + skip, sizes + skip, count)

        return copy

    return prepare


def _built() -> Path:
    """Return the compiled library; raises OSError or SubprocessError where there can be none."""
    text = _SOURCE.read_bytes()
    name = hashlib.sha256(text + repr((_FLAGS, platform.machine())).encode()).hexdigest()[:24]
    folder = _cache_folder()
    path = folder / f"copy-runs-{name}.so"
    if path.exists():
        _check_own(path)
        return path
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler (cc)")
    with tempfile.TemporaryDirectory(dir=folder) as building:
        made = Path(building) / path.name
        command = [compiler, *_FLAGS, "-o", str(made), str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_S)
        made.chmod(0o500)
        made.replace(path)  # at once, whoever else is building it too
    return path


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "twinpool"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_own(folder)
    return folder


def _check_own(path: Path) -> None:
    """Raise PermissionError unless only this user can have written it: it is about to be run."""
    found = path.lstat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} belongs to another user or can be written to by others")
