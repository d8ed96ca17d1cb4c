"""KV from one process's GPU memory to another's, as a prefill instance hands it to decode.

Sender and receiver share the GPU, each with a cache of Llama-3-8B's KV, and the paths are those
that serve requests. At once: the receiver's GPU reads what the sender has lent. Through the host:
layers saved to its memory beside the passes, the transfer with its checks and checksums, and pieces
loaded as they land. The clock runs from the first layer that is computed to the moment when a pass
may read the last. The limit is a plain copy within the GPU of as many bytes, and beside what goes
through the host are the two copies over the bus alone, to locked host memory and back.
"""

import re
import statistics
import sys
from dataclasses import replace

import torch

from bench.gpus.device import timer_of
from bench.kernel_timing import Timer
from bench.movers.ours import request_options
from bench.movers.pair import Pair
from bench.movers.works import CARRIERS, Carrier, Ranks, Request, Work
from bench.report import GrowingReport, Row, median_and_spread
from service.threads import thread_env

TOKENS = (128, 4096, 32_768)
_THREADS = 2
_WARM_UP = 2
_SIDE = "bench.gpus.transfer_side"
_LLAMA = Request(source=Ranks(), target=Ranks(), layers=32, kv_heads=8, head_size=128)


def measure(
    device: torch.device,
    pattern: str,
    rounds: int,
    figures: GrowingReport,
    *,
    request: Request = _LLAMA,
    tokens: tuple[int, ...] = TOKENS,
) -> None:
    """Measure the sequences whose names match."""
    timer = timer_of(device)
    tcp, shm = CARRIERS
    for carrier, host_copy in ((shm, False), (shm, True), (tcp, True)):
        way = f"by {carrier.name}" if host_copy else "at once"
        for count in tokens:
            name = f"KV of {count} tokens, GPU to GPU, {way}"
            if re.search(pattern, name):
                asked = replace(request, tokens=count)
                with figures.attempt(name):
                    row = _row(name, asked, carrier, device, timer, rounds, host_copy=host_copy)
                    figures.put(row)


def _row(
    name: str,
    request: Request,
    carrier: Carrier,
    device: torch.device,
    timer: Timer,
    rounds: int,
    *,
    host_copy: bool,
) -> Row:
    work = Work(
        name=name,
        slices=request.bytes // request.slice_bytes,
        slice_bytes=request.slice_bytes,
        request=request,
    )
    command = [sys.executable, "-m", _SIDE]
    with Pair("ours", command, carrier, thread_env(_THREADS)) as pair:
        options = request_options(work, carrier)
        pair.open(work, device=str(device), host_copy=host_copy, **options)
        seconds = pair.move(work, range(_WARM_UP + rounds))[_WARM_UP:]
    gbps, spread = median_and_spread([request.bytes / each / 1e9 for each in seconds])
    return Row(
        row=name,
        ours=gbps,
        unit="GB/s",
        higher_is_better=True,
        limit=_gbps(timer, request.bytes, device, device, rounds),
        peer=_over_the_bus(timer, request.bytes, device, rounds) if host_copy else None,
        peer_name="copies to the host and back" if host_copy else None,
        spread=spread,
    )


def _over_the_bus(timer: Timer, size: int, device: torch.device, rounds: int) -> float:
    host = torch.device("cpu")
    there = _gbps(timer, size, device, host, rounds)
    back = _gbps(timer, size, host, device, rounds)
    return 1 / (1 / there + 1 / back)


def _gbps(
    timer: Timer, size: int, source: torch.device, target: torch.device, rounds: int
) -> float:
    """Return what a plain copy moves, counted once; the host's memory is locked."""
    a, b = (_memory(size, on, locked=source != target) for on in (source, target))
    return size / statistics.median(timer(lambda: b.copy_(a, non_blocking=True), rounds)) / 1e9


def _memory(size: int, device: torch.device, *, locked: bool) -> torch.Tensor:
    pin = locked and device.type == "cpu" and torch.cuda.is_available()
    return torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pin)
