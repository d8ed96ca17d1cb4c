"""Measures what splitting a prompt costs where the instance runs, and chooses the grain by it.

Owns what is timed, its fit, and that all ranks come to the same. What a pass is, the caller says;
where costs are kept between starts is no matter of this module.

All ranks measure at the same time, as in service they compete for cores and memory, and each time
that is used is the slowest rank's: so all decide alike, also when to stop.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
from torch import Tensor

from engine.ring.comm import Solo, Wire
from engine.ring.errors import RingError
from engine.ring.model import SplitCosts, ranks_for

# Makes a pass, to be run several times, of one prompt with so many tokens for each rank of a wire.
Trial = Callable[[int, Wire], Callable[[], object]]
# Returns each element's greatest value over all ranks of the instance, which call it together.
Greatest = Callable[[Tensor], Tensor]

# Below this, a rank's matrix products mostly read weights, and each grain is a region to transfer.
LEAST_GRAIN = 64
# A block of the pool is a grain on every rank: prompts take whole ones, prefixes match whole ones.
MOST_GRAIN = 1024

_LENGTHS = (64, 128, 256, 512, 1024, 2048)
_TURNS = 20
_BUDGET_S = 2.5  # of passes of one rank; messages and passes over all ranks take a third of it
_SMALL_BYTES, _LARGE_BYTES = 1 << 10, 4 << 20
_FASTEST_BYTES_PER_S = 1e12  # where a large message seems to take no longer than a small one


class Stopwatch:
    """Times what all ranks do at the same time, by the slowest of them."""

    def __init__(self, greatest: Greatest, clock: Callable[[], float] = time.perf_counter) -> None:
        self.spent_s = 0.0
        self._greatest = greatest
        self._clock = clock

    def least_s(self, *runs: Callable[[], object]) -> tuple[float, ...]:
        """Return each run's least seconds of several, of that rank where these are the most.

        The runs take turns, so that what disturbs one disturbs the others; long ones have fewer
        turns, but one at least.
        """
        least_s, spent_s = [float("inf")] * len(runs), 0.0
        for _ in range(_TURNS):
            own_s = [self._once_s(run) for run in runs]
            least_s = list(map(min, least_s, own_s))
            turn_s = sum(self._of_all(own_s))
            spent_s += turn_s
            if spent_s + turn_s > _BUDGET_S / len(_LENGTHS):
                break
        self.spent_s += spent_s
        return self._of_all(least_s)

    def _once_s(self, run: Callable[[], object]) -> float:
        self._of_all([0.0])  # the ranks begin together
        began = self._clock()
        run()
        return self._clock() - began

    def _of_all(self, seconds: list[float]) -> tuple[float, ...]:
        return tuple(self._greatest(torch.tensor(seconds, dtype=torch.float64)).tolist())


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured: `layers`, a token's K and V `token_bytes` in one, at most `longest` tokens.

    Messages are of the memory of `device`.
    """

    layers: int
    token_bytes: int
    longest: int
    device: torch.device


def measure(trial: Trial, wire: Wire, subject: Subject, watch: Stopwatch) -> SplitCosts:
    """Return this instance's costs after a few seconds; all ranks call it and get the same.

    A hop's time is what a pass of few tokens takes longer over all ranks than one rank's share of
    it alone: beside the message that is the kernel calls and the merging of one more block. Raises
    CommError.
    """
    lengths = [length for length in _LENGTHS if length <= subject.longest]
    points = _alone(trial, lengths or [subject.longest], watch)
    latency_s, bytes_per_s = _link(wire, subject.device, watch)
    share = points[0][0]
    share_s, split_s = watch.least_s(trial(share, Wire(Solo())), trial(share, wire))
    points.append((share, share_s))
    hops = (wire.size - 1) * subject.layers
    _, token_s, pair_s = fit(points)
    return SplitCosts(
        token_s=token_s,
        pair_s=pair_s,
        layers=subject.layers,
        hop_s=max(latency_s, (split_s - share_s) / hops),
        token_bytes=subject.token_bytes,
        bytes_per_s=bytes_per_s,
    )


def fit(points: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """Return (a, b, c), all at least 0, such that a + b * tokens + c * tokens**2 meets `points`.

    These are (tokens, seconds); squares of relative errors are least. `a` is what a pass takes
    whatever its length, on each rank and so however it is split.
    """
    tokens, seconds = np.array(points, np.float64).T
    scale = tokens.max()
    columns = np.stack([(tokens / scale) ** power for power in range(3)], 1) / seconds[:, None]
    best, best_error = np.zeros(3), np.inf
    # The best without negative terms is the plain best of some of the terms: try all choices,
    # those first that are preferred where points are too few to tell.
    for chosen in ([1], [2], [1, 2], [0, 1], [0, 2], [0], [0, 1, 2]):
        if len(chosen) > len(points):
            continue
        found = np.linalg.lstsq(columns[:, chosen], np.ones(len(points)))[0]
        error = float(np.sum((columns[:, chosen] @ found - 1) ** 2))
        if found.min() >= 0 and error < best_error - 1e-12:
            best, best_error = np.zeros(3), error
            best[chosen] = found
    fixed_s, token_s, pair_s = (float(term / scale**power) for power, term in enumerate(best))
    return fixed_s, token_s, pair_s


def shared(costs: SplitCosts | None, greatest: Greatest) -> SplitCosts | None:
    """Return on all ranks the costs that one of them, the first, may know; all call it."""
    told = (-1.0,) * len(fields(SplitCosts)) if costs is None else astuple(costs)
    found = greatest(torch.tensor(told, dtype=torch.float64)).tolist()
    if min(found) < 0:
        return None
    token_s, pair_s, layers, hop_s, token_bytes, bytes_per_s = found
    return SplitCosts(
        token_s=token_s,
        pair_s=pair_s,
        layers=int(layers),
        hop_s=hop_s,
        token_bytes=int(token_bytes),
        bytes_per_s=bytes_per_s,
    )


def grain_for(costs: SplitCosts, ranks: int, block_size: int, most: int = MOST_GRAIN) -> int:
    """Return the longest prompt, in whole blocks, that one of `ranks` ranks is soonest done with.

    At least LEAST_GRAIN tokens, at most `most` and MOST_GRAIN; but always a block. Raises RingError
    for a block of no tokens.
    """
    if block_size < 1:
        raise RingError(f"a block has at least one token, found {block_size}")
    highest = max(1, min(most, MOST_GRAIN) // block_size)
    lowest = min(-(-LEAST_GRAIN // block_size), highest)
    blocks = bisect_left(
        range(1, highest + 1), 2, key=lambda count: ranks_for(count * block_size, costs, ranks)
    )
    return max(lowest, blocks) * block_size


def _alone(trial: Trial, lengths: Sequence[int], watch: Stopwatch) -> list[tuple[int, float]]:
    """Return the seconds of passes that need no other cp rank, as far as the budget goes."""
    points: list[tuple[int, float]] = []
    solo = Wire(Solo())
    for length in lengths:
        if points:
            last, last_s = points[-1]
            if watch.spent_s + last_s * length / last > _BUDGET_S:
                break
        [least_s] = watch.least_s(trial(length, solo))
        points.append((length, least_s))
    return points


def _link(wire: Wire, device: torch.device, watch: Stopwatch) -> tuple[float, float]:
    """Return a small message's seconds to the next rank, and the bytes per second of a large."""

    def exchange(size: int) -> Callable[[], None]:
        message, into = torch.zeros(2, size, dtype=torch.uint8, device=device)
        return lambda: _exchange(wire, message, into)

    small_s, large_s = watch.least_s(exchange(_SMALL_BYTES), exchange(_LARGE_BYTES))
    return small_s, _LARGE_BYTES / max(large_s - small_s, _LARGE_BYTES / _FASTEST_BYTES_PER_S)


def _exchange(wire: Wire, message: Tensor, into: Tensor) -> None:
    [tag] = wire.tags(1)
    pending = [
        wire.receive(into, (wire.rank - 1) % wire.size, tag),
        wire.send(message, (wire.rank + 1) % wire.size, tag),
    ]
    for each in pending:
        each.wait()
