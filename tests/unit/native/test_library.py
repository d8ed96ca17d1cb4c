"""Machine code is built once, only loaded from files of our own, and its lack is told of."""

import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import native
from native import NativeError, library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")

NONE: frozenset[str] = frozenset()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TWINPOOL_NATIVE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    # Where the only compiler is one that counts how often it is asked to compile.
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    real = shutil.which("g++")
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || echo once >> {tmp_path}/compiled\nexec {real} "$@"\n'
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", f"{compiler.parent}:{os.environ['PATH']}")
    path = tmp_path / "seven.cpp"
    path.write_text('extern "C" int seven() { return 7; }')
    return path


def compiled(source: Path) -> int:
    return len((source.parent / "compiled").read_text().splitlines())


def kept(source: Path) -> Iterator[Path]:
    return (source.parent / "cache" / "twinpool" / "native").glob("*.so")


def test_what_is_built_once_is_loaded_again(source: Path) -> None:
    assert native.load(source, NONE).seven() == 7
    assert native.load(source, NONE).seven() == 7
    assert compiled(source) == 1
    [path] = kept(source)
    for folder in (path.parent, path.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_another_source_is_built_anew(source: Path) -> None:
    native.load(source, NONE)
    source.write_text('extern "C" int eight() { return 8; }')
    assert native.load(source, NONE).eight() == 8


def test_another_header_is_built_anew(source: Path) -> None:
    header = source.with_name("number.h")
    header.write_text("#define NUMBER 7")
    source.write_text('#include "number.h"\nextern "C" int number() { return NUMBER; }')
    assert native.load(source, NONE).number() == 7
    header.write_text("#define NUMBER 8")
    assert native.load(source, NONE).number() == 8


def test_several_may_build_at_once(source: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: native.load(source, NONE).seven(), range(4)))
    assert found == [7] * 4
    assert len(list(kept(source))) == 1


@pytest.mark.parametrize("content", [b"", b"\x7fELF and nothing else", b"text"])
def test_corrupt_library_is_built_again(
    source: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.load(source, NONE)
    [path] = kept(source)
    # Elsewhere, since what is at this path is loaded for good.
    moved = path.parents[3] / "elsewhere" / path.relative_to(path.parents[2])
    moved.parent.mkdir(mode=0o700, parents=True)
    moved.parent.parent.chmod(0o700)
    moved.write_bytes(content)
    moved.chmod(0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(moved.parents[2]))
    assert native.load(source, NONE).seven() == 7
    assert compiled(source) == 2


def test_library_that_others_can_write_is_refused(source: Path) -> None:
    native.load(source, NONE)
    [path] = kept(source)
    path.chmod(0o720)
    with pytest.raises(NativeError, match="written to by others"):
        native.load(source, NONE)


def test_folder_that_others_can_write_is_refused(source: Path) -> None:
    folder = source.parent / "cache" / "twinpool" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(NativeError, match="written to by others"):
        native.load(source, NONE)
    assert not list(kept(source))


def test_library_of_another_user_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.load(source, NONE)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(NativeError, match="belongs to another user"):
        native.load(source, NONE)


def test_place_where_nothing_can_be_kept_is_told_of(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file
    with pytest.raises(NativeError, match="no place for it"):
        native.load(source, NONE)


def test_lack_of_a_compiler_is_told_of(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeError, match="no C\\+\\+ compiler"):
        native.load(source, NONE)


def test_source_that_does_not_compile_is_told_of(source: Path) -> None:
    source.write_text("this is no C++")
    with pytest.raises(NativeError, match="g\\+\\+: "):
        native.load(source, NONE)
    assert not list(kept(source))


def test_compiler_that_hangs_is_given_up(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = source.parent / "slow"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] || exec /bin/sleep 60\n')
    slow.chmod(0o700)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(library, "_COMPILE_S", 0.2)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NativeError, match="timed out"):
        native.load(source, NONE)


def test_next_compiler_is_tried(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false -v")
    assert native.load(source, NONE).seven() == 7


def test_switch_leaves_it_out(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINPOOL_NATIVE", "0")
    with pytest.raises(NativeError, match="TWINPOOL_NATIVE is 0"):
        native.load(source, NONE)


def test_processor_that_lacks_something_is_told_of(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags\t\t: fpu avx512f\n\nprocessor : 1\nflags : avx512_bf16\n")
    monkeypatch.setattr(library, "_CPU_INFO", info)
    with pytest.raises(NativeError, match="has no avx512_bf16"):
        native.load(source, frozenset(("avx512f", "avx512_bf16")))
    info.unlink()
    with pytest.raises(NativeError, match="has no avx512f"):
        native.load(source, frozenset(("avx512f",)))
