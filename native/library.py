"""From C and C++ files to loaded libraries: which compiler, which options, built once."""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence, Set
from functools import cache
from pathlib import Path
from typing import NamedTuple

from native.cache import check_own, own_folder
from native.errors import NativeError

logger = logging.getLogger(__name__)

_SWITCH = "TWINPOOL_NATIVE"  # "0" where nothing native is to be used, to compare
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
_COMPILE_S, _ASK_S = 60.0, 10.0
_CPU_INFO = Path("/proc/cpuinfo")

# OpenMP's runtime is the one that torch has loaded already, by its name: one pool of threads.
OPENMP = ("-fopenmp", "-fno-math-errno", "-fno-trapping-math")


class _Language(NamedTuple):
    name: str
    variable: str  # of the environment, with the user's choice of a compiler
    compilers: tuple[str, ...]
    flags: tuple[str, ...]


_LANGUAGES = {
    ".c": _Language("C", "CC", ("cc", "gcc", "clang"), ("-std=c11",)),
    ".cpp": _Language("C++", "CXX", ("g++", "c++", "clang++"), ("-std=c++17", "-fno-exceptions")),
}


@cache
def load_if_possible(
    source: Path, needed: frozenset[str], options: tuple[str, ...], otherwise: str
) -> ctypes.CDLL | None:
    """Do as `load` does, once; where that is not possible, return None.

    The log then says why, after what happens `otherwise`.
    """
    try:
        return load(source, needed, options)
    except NativeError as exc:
        logger.info("%s: %s", otherwise, exc)
        return None


def load(source: Path, needed: Set[str], options: Sequence[str] = ()) -> ctypes.CDLL:
    """Return the library made of a C or C++ file; compiled at a machine's first call, then kept.

    `options` are more of the compiler's. Raises NativeError, which says why, where the
    processor lacks one of `needed`, where there is no compiler or place to keep the library, or
    where TWINPOOL_NATIVE is 0.
    """
    if os.environ.get(_SWITCH, "1") == "0":
        raise NativeError(f"{_SWITCH} is 0")
    found = cpu_flags()
    if missing := needed - found:
        raise NativeError(f"the processor has no {', '.join(sorted(missing))}")
    folder = _folder()
    language = _LANGUAGES[source.suffix]
    flags = (*_FLAGS, *language.flags, *options)
    problems = []
    for compiler in _compilers(language):
        try:
            made_of = _texts(source), sorted(found), compiler, flags, _version(compiler)
            name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
            return _loaded(folder / f"{name}.so", [*compiler, *flags, str(source)])
        except (OSError, subprocess.SubprocessError) as exc:
            problems.append(f"{shlex.join(compiler)}: {_said(exc)}")
    tried = ", ".join((language.variable, *language.compilers))
    raise NativeError("; ".join(problems) or f"there is no {language.name} compiler ({tried})")


def _texts(source: Path) -> list[bytes]:
    """Return the content of a file and of all headers beside it."""
    return [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]


def _version(compiler: Sequence[str]) -> bytes:
    command = [*compiler, "--version"]
    return subprocess.run(command, check=True, capture_output=True, timeout=_ASK_S).stdout


def _loaded(path: Path, command: Sequence[str]) -> ctypes.CDLL:
    if path.exists():
        check_own(path)
        try:
            return ctypes.CDLL(str(path))
        except OSError as exc:
            logger.warning("%s is built again: %s", path, exc)
    _build(path, command)
    return ctypes.CDLL(str(path))


def _build(path: Path, command: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as building:
        made = Path(building) / path.name
        subprocess.run(
            [*command, "-o", str(made)], check=True, capture_output=True, timeout=_COMPILE_S
        )
        made.chmod(0o500)
        with made.open("rb") as file:
            os.fsync(file.fileno())  # one that is cut short would kill whoever loads it
        made.replace(path)  # at once, whoever else is building it too


def _compilers(language: _Language) -> Iterator[list[str]]:
    """Yield the commands that there are, the user's choice first."""
    for command in (os.environ.get(language.variable, ""), *language.compilers):
        words = shlex.split(command)
        if words and (program := shutil.which(words[0])):
            yield [program, *words[1:]]


def cpu_flags() -> frozenset[str]:
    """Return what the processor can do, as Linux calls it; nothing where that cannot be known."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())


def _folder() -> Path:
    try:
        return own_folder("native")
    except (OSError, NativeError) as exc:
        raise NativeError(f"there is no place for it: {exc}") from exc


def _said(exc: Exception) -> str:
    """Return the last line of what a compiler said, or the error itself."""
    told = exc.stderr if isinstance(exc, subprocess.CalledProcessError) else None
    lines = (told or b"").decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else str(exc)
