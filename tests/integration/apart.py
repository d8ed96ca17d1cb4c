"""A launcher of instances that compute with another memory than transfers use, as on a GPU.

As `python -m prefill` and `python -m decode`, with the role as the first argument. Copies between
both are late, and the memory for transfers begins as NaN.
"""

import sys

import torch

import decode.__main__
import prefill.__main__
import service.instance
from engine.cache_memory import CacheMemory, HostCopy
from engine.kvcache import Allocate, KVCache
from tests.late_lane import LateLane


def apart(cache: KVCache, allocate: Allocate | None) -> CacheMemory:
    """Return a memory of its own for transfers."""
    tensor = cache.tensor
    host = allocate(tensor.shape, tensor.dtype) if allocate else torch.empty_like(tensor)
    return HostCopy(cache, host.fill_(torch.nan), LateLane())


def main() -> None:
    """Launch an instance."""
    role = sys.argv.pop(1)
    service.instance.__dict__["cache_memory"] = apart
    {"prefill": prefill.__main__, "decode": decode.__main__}[role].app()


if __name__ == "__main__":
    main()
