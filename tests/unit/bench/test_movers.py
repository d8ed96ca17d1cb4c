"""Pools and pairs: real processes, but bytes go through a file."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bench
from bench.movers import nixl_side
from bench.movers.memcpy import memcpy_s
from bench.movers.pair import Pair
from bench.movers.side import Pool
from bench.movers.works import CARRIERS, Work
from bench.sides.process import SideFailed

WORK = Work(name="small", slices=5, slice_bytes=4096)

SIDE = f"""
import sys, time
sys.path.insert(0, {str(Path(bench.__file__).parents[1])!r})
from bench.movers.side import Pool, serve

class ThroughFile:
    def open(self, *, side, pool_slices, slice_bytes, file, fault):
        self.pool = Pool(pool_slices, slice_bytes, filled=side == "source")
        self.file, self.fault = file, fault
        return {{"side": side}}

    def meet(self, *, peer):
        self.receives = peer["side"] == "source"
        return {{}}

    def prepare(self, *, mine, theirs, initiate, number):
        self.mine, self.theirs = mine, theirs
        if self.receives:
            self.pool.clear(mine)
        print("what a library says")
        return {{}}

    def go(self):
        if self.fault == "die":
            sys.exit("out of luck")
        began = time.perf_counter()
        with open(self.file, "wb") as file:
            for index in self.mine:
                file.write(self.pool.bytes_SB[index])
        return {{"began": began}}

    def finish(self):
        content = open(self.file, "rb").read()
        size = len(content) // len(self.mine)
        for turn, index in enumerate(self.mine[1:] if self.fault == "skip" else self.mine):
            self.pool.bytes_SB[index] = memoryview(content)[turn * size : (turn + 1) * size]
        return {{"ended": time.perf_counter()}}

    def check(self):
        self.pool.check(self.mine, self.theirs)
        return {{}}

    def progress(self):
        return False

serve(ThroughFile())
"""


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair("through a file", [sys.executable, "-c", SIDE], CARRIERS[0]) as both:
        yield both


def opened(pair: Pair, folder: Path, fault: str = "") -> dict[str, Any]:
    return pair.open(WORK, file=str(folder / "bytes"), fault=fault)


def test_a_pair_moves_checks_and_times_every_round(pair: Pair, tmp_path: Path) -> None:
    assert opened(pair, tmp_path) == {"side": "source"}
    seconds = pair.move(WORK, range(3))
    assert len(seconds) == 3
    assert min(seconds) > 0


def test_bytes_in_the_wrong_place_end_the_run(pair: Pair, tmp_path: Path) -> None:
    opened(pair, tmp_path, fault="skip")
    with pytest.raises(SideFailed, match="does not hold the bytes"):
        pair.move(WORK, [0])


def test_a_process_that_dies_leaves_its_last_words(pair: Pair, tmp_path: Path) -> None:
    opened(pair, tmp_path, fault="die")
    with pytest.raises(SideFailed, match=r"(?s)sender is gone.*out of luck"):
        pair.move(WORK, [0])


def test_a_command_that_cannot_run_is_named() -> None:
    with pytest.raises(SideFailed, match="no-such-python cannot be run"):
        Pair("x", ["no-such-python"], CARRIERS[0])


def test_a_pool_tells_its_slices_and_words_apart() -> None:
    source, target = (Pool(4, 64, filled=filled) for filled in (True, False))
    target.bytes_SB[3] = source.bytes_SB[1]
    target.check([3], [1])
    with pytest.raises(ValueError, match=r"slice 3 .* source 2"):
        target.check([3], [2])
    target.bytes_SB[3, 63] ^= 1
    with pytest.raises(ValueError, match="slice 3"):
        target.check([3], [1])
    target.clear([3])
    assert not target.bytes_SB.any()


def test_memcpy_runs_and_checks_every_round() -> None:
    assert len(memcpy_s(WORK, range(2))) == 2


def test_the_peers_side_needs_nothing_of_this_project() -> None:
    source = Path(nixl_side.__file__).read_text()
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - sys.stdlib_module_names == {"numpy"}
