"""Machine code that is compiled where it is to run. Owns building, keeping and loading it.

Knows nothing of what the code does, nor of what is to be done where there can be none.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence, Set
from functools import cache
from pathlib import Path

from engine.errors import UnsupportedError

logger = logging.getLogger(__name__)

_SWITCH = "TWINPOOL_NATIVE"  # "0" where nothing native is to be used, to compare
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-exceptions", "-shared", "-fPIC")
_COMPILE_S, _ASK_S = 60.0, 10.0
_CPU_INFO = Path("/proc/cpuinfo")

# OpenMP's runtime is the one that torch has loaded already, by its name: one pool of threads.
OPENMP = ("-fopenmp", "-fno-math-errno", "-fno-trapping-math")


@cache
def load_if_possible(
    source: Path, cpu_flags: frozenset[str], options: tuple[str, ...]
) -> ctypes.CDLL | None:
    """Do as `load` does, once; where that is not possible, say so in the log and return None."""
    try:
        return load(source, cpu_flags, options)
    except UnsupportedError as exc:
        logger.info("torch's operators do the work of %s: %s", source.name, exc)
        return None


def load(source: Path, cpu_flags: Set[str], options: Sequence[str] = ()) -> ctypes.CDLL:
    """Return the library made of a C++ file; compiled at the first call on a machine, then kept.

    `options` are more of the compiler's. Raises UnsupportedError, which says why, where the
    processor lacks one of `cpu_flags`, where there is no compiler or place to keep the library, or
    where TWINPOOL_NATIVE is 0.
    """
    if os.environ.get(_SWITCH, "1") == "0":
        raise UnsupportedError(f"{_SWITCH} is 0")
    found = _cpu_flags()
    if missing := cpu_flags - found:
        raise UnsupportedError(f"the processor has no {', '.join(sorted(missing))}")
    folder = _cache_folder()
    problems = []
    for compiler in _compilers():
        try:
            return _loaded(source, [*compiler, *options], found, folder)
        except (OSError, subprocess.SubprocessError) as exc:
            problems.append(f"{shlex.join(compiler)}: {_said(exc)}")
    raise UnsupportedError("; ".join(problems) or "there is no C++ compiler (CXX, g++, clang++)")


def _loaded(source: Path, compiler: list[str], cpu_flags: Set[str], folder: Path) -> ctypes.CDLL:
    text = source.read_bytes()
    asked = subprocess.run(
        [*compiler, "--version"], check=True, capture_output=True, timeout=_ASK_S
    )
    made_of = text, _FLAGS, sorted(cpu_flags), compiler, asked.stdout
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
    path = folder / f"{name}.so"
    if path.exists():
        _check_own(path)
        try:
            return ctypes.CDLL(str(path))
        except OSError as exc:
            logger.warning("%s is built again: %s", path, exc)
    _build(source, compiler, path)
    return ctypes.CDLL(str(path))


def _build(source: Path, compiler: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as building:
        made = Path(building) / path.name
        command = [*compiler, *_FLAGS, "-o", str(made), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_S)
        made.chmod(0o500)
        with made.open("rb") as file:
            os.fsync(file.fileno())  # one that is cut short would kill whoever loads it
        made.replace(path)  # at once, whoever else is building it too


def _compilers() -> Iterator[list[str]]:
    """Yield the commands that there are, the user's choice first."""
    for command in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        words = shlex.split(command)
        if words and (program := shutil.which(words[0])):
            yield [program, *words[1:]]


def _cpu_flags() -> frozenset[str]:
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())


def _cache_folder() -> Path:
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        above = Path(root) / "twinpool"
        folder = above / "native"
        for each in (above, folder):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_own(each)
    except (OSError, RuntimeError) as exc:  # the latter from a user without a home
        raise UnsupportedError(f"there is no place for it: {exc}") from exc
    return folder


def _check_own(path: Path) -> None:
    """Raise UnsupportedError unless only this user can have written it: it is about to be run."""
    found = path.lstat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsupportedError(f"{path} belongs to another user or can be written to by others")


def _said(exc: Exception) -> str:
    """Return the last line of what a compiler said, or the error itself."""
    told = exc.stderr if isinstance(exc, subprocess.CalledProcessError) else None
    lines = (told or b"").decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else str(exc)
