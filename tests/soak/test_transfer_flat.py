"""Nothing grows over ten thousand transfers and two hundred reconnects, whatever the lane.

TWINPOOL_FLAT_TRANSFERS sets how many transfers (10,000) are made on each lane.
"""

import os
import time
from collections.abc import Iterator

import pytest

from tests.flat.growth import grown, table
from tests.flat.ranks import LANES, Ranks, Watched

TRANSFERS = int(os.environ.get("TWINPOOL_FLAT_TRANSFERS", "10000"))
RECONNECTS = 200
WARM_UP = 1000, 10


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lane", LANES)
def test_nothing_grows_over_thousands_of_transfers(ranks: Ranks, lane: str) -> None:
    ranks.start(LANES[lane])
    ranks.warm_up(*WARM_UP)
    began = time.monotonic()
    transfers = ranks.watch_transfers(TRANSFERS)
    between = time.monotonic()
    reconnects = ranks.watch_reconnects(RECONNECTS)
    ended = time.monotonic()
    ranks.stop()
    _show(f"{lane}: {TRANSFERS} transfers in {between - began:.1f} s", transfers)
    _show(f"{lane}: {RECONNECTS} reconnects in {ended - between:.1f} s", reconnects)
    ucx_links = RECONNECTS if LANES[lane].lane == "ucx" else 0
    for role in ("send", "receive"):
        assert grown(transfers[role]) == []
        assert grown(reconnects[role], ucx_links) == []


@pytest.mark.timeout(3600)
def test_planted_crumb_shows_over_thousands_of_transfers(ranks: Ranks) -> None:
    ranks.start(LANES["mapped"])
    ranks.warm_up(*WARM_UP)
    ranks.plant("crumb")
    watched = ranks.watch_transfers(max(TRANSFERS, 10000))
    ranks.stop()
    found = {each.measure for each in grown(watched["receive"])}
    assert {"resident KiB", "python blocks"} <= found


def _show(what: str, watched: Watched) -> None:
    print(f"\n{what}")
    for role, held in watched.items():
        print(f"  {role}\n{table(held)}")
