"""The compiled loop copies what the plain one copies, and is only loaded from files of our own."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvtransfer import native, runs


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = native.copy_runs
    cached.cache_clear()
    yield tmp_path / "twinpool"
    cached.cache_clear()


def some_runs(rng: random.Random, total: int) -> runs.Cuts:
    """Runs that do not meet, of odd sizes and at odd places."""
    begins, ends, at = [], [], 0
    while at < total - 5000:
        at += rng.randint(0, 300)
        begins.append(at)
        at += rng.choice([1, 7, 63, 64, 65, 1000, 4097])
        ends.append(at)
    return np.array(begins), np.array(ends)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_runs_arrive_and_nothing_else_changes(
    seed: int, compiled: bool, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled and native.copy_runs() is None:
        pytest.skip("no C compiler here")
    if not compiled:
        monkeypatch.setattr(native, "copy_runs", lambda: None)
    rng = random.Random(seed)
    source = np.frombuffer(rng.randbytes(100_000), np.uint8)
    target = np.full(100_000, 0xAB, np.uint8)
    begins, ends = some_runs(rng, len(source))
    into, wanted = (begins, ends), target.copy()
    sizes = ends - begins
    out_begins = np.cumsum(sizes) - sizes
    for begin, at, size in zip(begins, out_begins, sizes, strict=True):
        wanted[begin : begin + size] = source[at : at + size]
    runs.copy_runs(target.data, into, source.data, (out_begins, out_begins + sizes))
    assert (target == wanted).all()


def test_it_is_built_once_and_kept(fresh: Path) -> None:
    if native.copy_runs() is None:
        pytest.skip("no C compiler here")
    (built,) = fresh.iterdir()
    before = built.stat().st_mtime_ns
    native.copy_runs.cache_clear()
    assert native.copy_runs() is not None
    assert built.stat().st_mtime_ns == before


def test_without_a_compiler_there_is_none(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.copy_runs() is None


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_can_write_to_is_not_loaded(fresh: Path, what: str) -> None:
    if native.copy_runs() is None:
        pytest.skip("no C compiler here")
    (built,) = fresh.iterdir()
    os.chmod(fresh if what == "folder" else built, 0o777)
    native.copy_runs.cache_clear()
    assert native.copy_runs() is None
