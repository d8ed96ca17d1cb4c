"""How evenly experts that change places spread skewed tokens over ranks, and what a step waits.

The choices are made up: how often experts are chosen falls off as a power of their rank, in an
order of its own for each layer. Places are chosen by the tokens of one window and judged by those
of the next, beside the even places that an instance starts with. The pause is of a real layer.
"""

import sys
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bench import checkpoints
from bench.decodes.settings import Settings
from bench.report import Row, median_and_spread
from bench.sides.process import Side
from engine.dispatch import ExpertMap
from engine.dispatch.balance import Slots, balanced, imbalance
from engine.parallel import Layout
from service.threads import thread_env

Say = Callable[[str], None]

_EXPERTS, _TOP_K, _LAYERS = 128, 8, 24
_RANKS, _REDUNDANT = 8, (0, 2)
_SKEW = 0.7  # how fast choices fall off; the first of 128 then has 9 times the mean
_WINDOW = 20_000  # tokens
_MOVING_RANKS = 2


def rows(settings: Settings, say: Say) -> list[Row]:
    """Measure what the settings want of it; raises SideFailed."""
    found = []
    for redundant in _REDUNDANT:
        name = f"balance, {_RANKS} ranks, {redundant} redundant, hottest to mean"
        if settings.wants(name):
            found.append(_places(name, redundant))
    name = "balance, moe, a layer's pause"
    if settings.wants(name):
        found.append(_pause(name, settings, say))
    return found


def _places(name: str, redundant: int) -> Row:
    """Return how even the next window is, over layers, beside the places at the start."""
    even = ExpertMap.even(_EXPERTS, Layout(dp=_RANKS, ep=_RANKS), redundant).slots
    before, after = [], []
    for layer in range(_LAYERS):
        window, following = _windows(layer)
        placed: Slots = balanced(window, even)
        before.append(imbalance(following, even))
        after.append(imbalance(following, placed))
    middle, spread = median_and_spread(after)
    return Row(
        row=name,
        ours=middle,
        unit="x",
        higher_is_better=False,
        limit=1.0,
        peer=median_and_spread(before)[0],
        peer_name="even places",
        spread=spread,
    )


def _windows(layer: int) -> Sequence[list[int]]:
    """Return how many tokens chose each expert, in two windows of the same routing."""
    random = np.random.default_rng(layer)
    weights: NDArray[np.float64] = np.arange(1, _EXPERTS + 1, dtype=np.float64) ** -_SKEW
    chances = random.permutation(weights / weights.sum())
    counts = random.multinomial(_WINDOW * _TOP_K, chances, size=2)
    return [each.tolist() for each in counts]


def _pause(name: str, settings: Settings, say: Say) -> Row:
    """Return the time of a switch of all of a rank's experts of a layer, in ms."""
    folder = checkpoints.kept(settings.checkpoints, checkpoints.MOE)
    command = [sys.executable, "-m", "bench.decodes.balance_side"]
    pauses_ms = []
    with Side("moving", command, thread_env(1)) as side:
        side.open(model=str(folder), ranks=_MOVING_RANKS)
        for number in range(settings.rounds + 1):
            said = side.ask("move")
            if number:  # the first is a warm-up
                pauses_ms.append(1e3 * said["switch_s"])
        say(f"{name}: {said['experts']} experts, read in {1e3 * said['read_s']:.1f} ms")
    middle, spread = median_and_spread(pauses_ms)
    return Row(row=name, ours=middle, unit="ms", higher_is_better=False, spread=spread)
