"""A launcher of instances that compute with another memory than transfers use, as on a GPU.

As `python -m prefill` and `python -m decode`, with the role as the first argument. With a copy in
the host's memory copies between both are late, and that memory begins as NaN. Without one the cache
counts as a GPU's, which is lent as a file of memory.
"""

import sys
from typing import Any

import torch

import decode.__main__
import engine.runner
import prefill.__main__
import service.instance
from engine.cache_memory import CacheMemory, CacheOnGpu, HostCopy
from engine.kvcache import Allocate, KVCache
from tests.late_lane import LateLane
from tests.lent_boxes import LentBoxes

BOXES = LentBoxes()


class LentCache(KVCache):
    """A cache that can be lent."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allocate": BOXES.allocate})


def apart(cache: KVCache, allocate: Allocate | None, *, host_copy: bool) -> CacheMemory:
    """Return a memory of its own for transfers, or the cache as a GPU's."""
    tensor = cache.tensor
    if not host_copy:
        BOXES.warm_up(tensor)
        return CacheOnGpu(cache, LateLane(), BOXES)
    host = allocate(tensor.shape, tensor.dtype) if allocate else torch.empty_like(tensor)
    return HostCopy(cache, host.fill_(torch.nan), LateLane())


def main() -> None:
    """Launch an instance."""
    role = sys.argv.pop(1)
    service.instance.__dict__["cache_memory"] = apart
    engine.runner.__dict__["KVCache"] = LentCache
    {"prefill": prefill.__main__, "decode": decode.__main__}[role].app()


if __name__ == "__main__":
    main()
