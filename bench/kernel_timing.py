"""Times what runs on a GPU, and what the GPU allows. Knows no kernel of ours."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

_WARM_UP = 3
# Several times the L2 of any GPU, and long enough that the next launch is queued before it ends.
_FLUSH_BYTES = 1 << 29
_COPY_BYTES = 1 << 31
_SIDE = 8192


class Timer(Protocol):
    """Tells how long a call keeps the device busy."""

    def __call__(self, run: Callable[[], object], repeats: int) -> list[float]:
        """Return the seconds of each of `repeats` calls that find nothing in a cache."""
        ...


class CudaTimer:
    """Times by the device's own events; each call starts with another memory's bytes in the L2."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object], repeats: int) -> list[float]:
        """See Timer."""
        for _ in range(_WARM_UP):
            run()
        seconds = []
        for _ in range(repeats):
            began, ended = (_event() for _ in range(2))
            self._flush.zero_()
            began.record()
            run()
            ended.record()
            ended.synchronize()
            seconds.append(began.elapsed_time(ended) / 1e3)
        return seconds


class CpuTimer:
    """Times by the clock; see Timer. To try this program out where there is no GPU."""

    def __call__(self, run: Callable[[], object], repeats: int) -> list[float]:
        """See Timer."""
        run()
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        return seconds


def _event() -> Any:  # torch's own has no types
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copied_bytes_per_s(timer: Timer, device: torch.device, repeats: int) -> float:
    """Return what a plain copy reads and writes in a second."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / statistics.median(timer(lambda: target.copy_(source), repeats))


def flops_per_s(timer: Timer, device: torch.device, repeats: int) -> float:
    """Return what a large bf16 product computes in a second, of random numbers."""
    a, b = (torch.randn(_SIDE, _SIDE, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * _SIDE**3 / statistics.median(timer(lambda: torch.mm(a, b, out=out), repeats))
