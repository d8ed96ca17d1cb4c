"""What a plain use of UCX does: one tagged message for each slice, no packing."""

import sys
from collections.abc import Sequence

from bench.movers.pair import Pair
from bench.movers.works import Carrier, Work


def message_a_slice_s(work: Work, carrier: Carrier, numbers: Sequence[int]) -> list[float]:
    """Return the seconds that each of these rounds took."""
    command = [sys.executable, "-m", "bench.movers.slices_side"]
    with Pair("one message a slice", command, carrier) as pair:
        pair.open(work)
        return pair.move(work, numbers)
