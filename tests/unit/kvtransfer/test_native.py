"""The compiled loop copies what the plain one copies, and is only loaded from files of our own."""

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvtransfer import native, runs


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = native.loop
    cached.cache_clear()
    monkeypatch.delenv("TWINPOOL_NATIVE", raising=False)
    yield tmp_path / "twinpool" / "native"
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


@pytest.mark.parametrize("way", ["crc on the way", "crc apart", "no loop"])
@pytest.mark.parametrize("seed", range(8))
def test_runs_arrive_with_their_crc_and_nothing_else_changes(
    seed: int, way: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(way, monkeypatch)
    rng = random.Random(seed)
    source = np.frombuffer(rng.randbytes(100_000), np.uint8)
    target = np.full(100_000, 0xAB, np.uint8)
    begins, ends = some_runs(rng, len(source))
    into, wanted = (begins, ends), target.copy()
    sizes = ends - begins
    out_begins = np.cumsum(sizes) - sizes
    for begin, at, size in zip(begins, out_begins, sizes, strict=True):
        wanted[begin : begin + size] = source[at : at + size]
    out = (out_begins, out_begins + sizes)
    assert runs.copy_runs(target.data, into, source.data, out) is None
    assert (target == wanted).all()
    target[:] = 0xAB
    found = runs.copy_runs(target.data, into, source.data, out, seed)
    assert found == zlib.crc32(source[: sizes.sum()].tobytes(), seed)
    assert found == runs.crc_runs(source.data, out, seed)
    assert (target == wanted).all()


def use(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the copies go one of their ways, where this machine has it."""
    if way == "no loop":
        monkeypatch.setattr(native, "loop", lambda: None)
        return
    loop = native.loop()
    if loop is None:
        pytest.skip("no C compiler here")
    if way == "crc apart":
        loop.can_crc = False
    elif not loop.can_crc:
        pytest.skip("this processor cannot fold")


def test_crc_of_any_size_from_any_place_to_any_place(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("crc on the way", monkeypatch)
    rng = random.Random(7)
    source = np.frombuffer(rng.randbytes(8192), np.uint8)
    for _ in range(2000):
        size = rng.choice([rng.randrange(80), rng.randrange(600), rng.randrange(6000)])
        at, to = rng.randrange(1000), rng.randrange(1000)
        crc = rng.getrandbits(32)
        target = np.zeros(8192, np.uint8)
        into, out = ((np.array([a]), np.array([a + size])) for a in (to, at))
        part = source[at : at + size]
        assert runs.copy_runs(target.data, into, source.data, out, crc) == zlib.crc32(
            part.tobytes(), crc
        )
        assert runs.crc_runs(source.data, out, crc) == zlib.crc32(part.tobytes(), crc)
        assert (target[to : to + size] == part).all()
        assert not target[:to].any()
        assert not target[to + size :].any()


def test_it_is_built_once_and_kept(fresh: Path) -> None:
    if native.loop() is None:
        pytest.skip("no C compiler here")
    (built,) = fresh.iterdir()
    before = built.stat().st_mtime_ns
    native.loop.cache_clear()
    assert native.loop() is not None
    assert built.stat().st_mtime_ns == before


def test_without_a_compiler_there_is_none(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.loop() is None


def test_switch_leaves_it_out(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINPOOL_NATIVE", "0")
    assert native.loop() is None


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_can_write_to_is_not_loaded(fresh: Path, what: str) -> None:
    if native.loop() is None:
        pytest.skip("no C compiler here")
    (built,) = fresh.iterdir()
    os.chmod(fresh if what == "folder" else built, 0o777)
    native.loop.cache_clear()
    assert native.loop() is None
