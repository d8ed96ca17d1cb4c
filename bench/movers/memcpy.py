"""The limit of memory: slices copied by numpy inside one process, on the receiver's core."""

import time
from collections.abc import Sequence

from bench.movers.cores import pinned, sender_and_receiver
from bench.movers.side import Pool
from bench.movers.works import Work, choice


def memcpy_s(work: Work, numbers: Sequence[int]) -> list[float]:
    """Return the seconds that each of these rounds took, caches flushed before it."""
    _, core = sender_and_receiver()
    with pinned(core):
        source = Pool(work.pool_slices, work.slice_bytes, filled=True)
        target = Pool(work.pool_slices, work.slice_bytes, filled=False)
        return [_round(source, target, *choice(work, number)) for number in numbers]


def _round(source: Pool, target: Pool, sources: list[int], targets: list[int]) -> float:
    source_SB, target_SB = source.bytes_SB, target.bytes_SB
    target.clear(targets)
    source.flush_caches()
    began = time.perf_counter()
    for there, here in zip(targets, sources, strict=True):
        target_SB[there] = source_SB[here]
    seconds = time.perf_counter() - began
    target.check(targets, sources)
    return seconds
