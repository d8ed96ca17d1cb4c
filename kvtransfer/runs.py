"""Where the units of a token range lie in a rank's blocks, and copies of runs of bytes.

Owns the arithmetic between units, blocks and places within a block, and between runs that are cut
at different bytes. Knows nothing of what the blocks hold.

A unit is `unit` tokens, of which a block holds `ratio`. Units of one extent can be copied at once:
with ratio 1 they are blocks that follow one another in memory, else they are of one block (whose
heads lie between its units and the next block's).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32

from kvtransfer import native
from kvtransfer.native import Loop, Runs

Ints = npt.NDArray[np.int64]
# Where runs begin and where they end, in bytes of their memory.
Cuts = tuple[Ints, Ints]

# From this size on a copy lets other threads run; below, asking costs more than it gives.
_LONG_BYTES = 128 << 10
# What surely is in a core's own cache still when it has just been read.
_CACHED_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """Each unit's block, and its place within the block."""

    blocks: Ints
    subs: Ints
    ratio: int

    def slab(self, box: npt.NDArray[Any], begin: int, end: int) -> npt.NDArray[Any]:
        """Return the units [begin, end), of one extent, of a box [L, P, B, ratio, N, unit, D].

        The view is [L, P, end - begin, N, unit, D].
        """
        block, sub = int(self.blocks[begin]), int(self.subs[begin])
        if self.ratio == 1:
            return box[:, :, block : block + end - begin, 0]
        return box[:, :, block, sub : sub + end - begin]


def units_of(ids: Ints, first: int, count: int, ratio: int) -> Units:
    """Return where `count` units lie, of which the first is the `first` of the blocks `ids`."""
    if ratio == 1:
        return Units(ids[first : first + count], np.zeros(count, np.int64), 1)
    index, subs = np.divmod(np.arange(first, first + count), ratio)
    return Units(ids[index], subs, ratio)


def extents(units: Units) -> list[tuple[int, int]]:
    """Return [begin, end)s of units that are of one extent."""
    (last,) = (units.blocks[1:] - units.blocks[:-1] != (units.ratio == 1)).nonzero()
    return list(pairwise((0, *(last + 1).tolist(), len(units.blocks))))


def copy_runs(
    target: memoryview, into: Cuts, source: memoryview, out: Cuts, crc: int | None = None
) -> int | None:
    """Copy runs onto runs of the same bytes in all, wherever either side is cut.

    With `crc`, returns it continued over the source's bytes: taken on the way, or where there is no
    loop that can, read again right after they were copied, from the cache.
    """
    (into_begins, into_ends), (out_begins, out_ends) = into, out
    if len(into_begins) != len(out_begins) or np.any(
        into_ends - into_begins != out_ends - out_begins
    ):
        into_begins, out_begins, sizes = _cut_alike(into, out)
    else:
        sizes = into_ends - into_begins
    runs = Runs(*(np.ascontiguousarray(each) for each in (into_begins, out_begins, sizes)))
    loop = native.loop()
    if crc is None:
        _copy(loop, target, source, runs)
        return None
    if loop is not None and loop.can_crc:
        return loop.copy_crc(target, source, runs, crc)
    for first, end in pairwise(_batches(sizes)):
        part = Runs(*(each[first:end] for each in runs))
        _copy(loop, target, source, part)
        for at, size in zip(part.out.tolist(), part.sizes.tolist(), strict=True):
            crc = crc32(source[at : at + size], crc)
    return crc


def crc_runs(source: memoryview, runs: Cuts, crc: int) -> int:
    """Return `crc` continued over runs."""
    begins, ends = runs
    loop = native.loop()
    if loop is not None and loop.can_crc:
        return loop.crc(source, np.ascontiguousarray(begins), ends - begins, crc)
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        crc = crc32(source[begin:end], crc)
    return crc


def _batches(sizes: Ints) -> list[int]:
    """Return where to cut runs into batches of about _CACHED_BYTES."""
    ends = np.cumsum(sizes)
    cuts = np.flatnonzero(np.diff(ends // _CACHED_BYTES)) + 1
    return [0, *cuts.tolist(), len(sizes)]


def _copy(loop: Loop | None, target: memoryview, source: memoryview, runs: Runs) -> None:
    if loop is not None:
        loop.copy(target, source, runs)
        return
    for to, at, size in zip(*(each.tolist() for each in runs), strict=True):
        _copy_one(target[to : to + size], source[at : at + size])


def _copy_one(target: memoryview, source: memoryview) -> None:
    if len(target) < _LONG_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _cut_alike(into: Cuts, out: Cuts) -> tuple[Ints, ...]:
    """Cut both lists of runs wherever either is cut; return (targets, sources, sizes)."""
    sizes = [ends - begins for begins, ends in (into, out)]
    stops = [np.cumsum(each) for each in sizes]
    marks = np.union1d(*stops)
    firsts = np.concatenate(([0], marks[:-1]))
    places = []
    for (begins, _), each, stop in zip((into, out), sizes, stops, strict=True):
        run = np.searchsorted(stop, firsts, side="right")
        places.append(begins[run] + firsts - (stop[run] - each[run]))
    return places[0], places[1], marks - firsts
