"""What counts as growth between checkpoints.

Pure. A checkpoint is what one process holds while its agent is at rest, by measure. Nothing may
grow, but for the measures that have a slack here, and what UCX is known to keep of a closed link.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Held = dict[str, float]

# Where the allocator and the interpreter have a will of their own: caches that fill slowly, pages
# that come back late. Measured between the thirds: up to 120 KiB and 560 blocks over the first
# 10,000 transfers, hardly any over the next 30,000.
SLACK: Held = {
    "python blocks": 1000,
    "private mappings": 4,
    "private KiB": 4096,
    "resident KiB": 512,
}
# Of a link that ends with something outstanding on its UCX worker ucxx never frees its own objects
# (docs/kv-transfer.md): 8 KiB and 9 blocks as measured. Such links are counted one by one, so that
# nothing else can hide behind them.
GIVEN_UP = "links given up"
PER_LINK_GIVEN_UP: Held = {"python blocks": 12, "private KiB": 12, "resident KiB": 10}
# What an agent at rest must not hold at all.
NONE_AT_REST = frozenset(
    {
        "transfers",
        "leases",
        "lease words",
        "turns",
        "quarantined links",
        "slots sending",
        "slots filling",
        "slots verified",
        "slots quarantined",
        "events nobody asked for",
    }
)


@dataclass(frozen=True)
class Growth:
    """A measure that went from `before` to `after`, where only `allowed` more was to be held."""

    measure: str
    before: float
    after: float
    allowed: float


def grown(checkpoints: Sequence[Held], ucx_links_ended: int = 0) -> list[Growth]:
    """Return what is held more at the end than at the start, beyond what is allowed.

    Compares the medians of the first and the last third: a steady leak moves them apart, one
    glance at a bad moment neither. Needs at least three checkpoints, from after a warm-up. Between
    them so many UCX links were ended; no more than these may have been given up.
    """
    third = max(len(checkpoints) // 3, 1)
    found = []
    given_up = _ends(checkpoints, third, GIVEN_UP)
    links = given_up[1] - given_up[0]
    for measure in sorted({name for held in checkpoints for name in held}):
        before, after = _ends(checkpoints, third, measure)
        allowed = SLACK.get(measure, 0) + links * PER_LINK_GIVEN_UP.get(measure, 0)
        if measure == GIVEN_UP:
            allowed = ucx_links_ended
        if measure in NONE_AT_REST:
            before = allowed = 0
        if after - before > allowed:
            found.append(Growth(measure, before, after, allowed))
    return found


def _ends(checkpoints: Sequence[Held], third: int, measure: str) -> tuple[float, float]:
    values = [held.get(measure, 0) for held in checkpoints]
    return statistics.median_high(values[:third]), statistics.median_low(values[-third:])


def table(checkpoints: Sequence[Held]) -> str:
    """Return the first and the last figure of what changed, and of what matters most."""
    shown = {"descriptors", "threads", "resident KiB", "shared mappings", "leases", "ucx workers"}
    lines = []
    for measure in sorted({name for held in checkpoints for name in held}):
        first, last = checkpoints[0].get(measure, 0), checkpoints[-1].get(measure, 0)
        if measure in shown or first != last:
            lines.append(f"    {measure:24}{first:10.0f} -> {last:10.0f}")
    return "\n".join(lines)
