"""Ours: the transfer's own way, between two processes with all ranks of a side in each.

The side is `ours_side`, which answers a `pair`'s lines: `open` also gets the mode and, where the
work stands for a request, its sizes; the sender's `go` answers when the move `began`, and the
receiver's `finish` when it `ended`.
"""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from bench.movers.pair import Pair
from bench.movers.works import Carrier, Work

# raw: the transport's data path alone; agent: grants, plan, checks and acknowledgement as served.
Mode = Literal["raw", "agent"]

_SIDE = "bench.movers.ours_side"


class Ours:
    """What is measured."""

    def modes(self, work: Work) -> tuple[Mode, ...]:
        """Return in which modes `work` is run."""
        return ("raw", "agent") if importlib.util.find_spec(_SIDE) else ()

    def run(self, work: Work, carrier: Carrier, mode: Mode, numbers: Sequence[int]) -> list[float]:
        """Return the seconds that each of these rounds took."""
        with Pair("ours", [sys.executable, "-m", _SIDE], carrier) as pair:
            pair.open(work, mode=mode, **request_options(work, carrier))
            return pair.move(work, numbers)


def request_options(work: Work, carrier: Carrier) -> dict[str, Any]:
    """Return what `open` is told besides the sizes of the slices."""
    request = asdict(work.request) if work.request else None
    return {"request": request, "carrier": carrier.name}
