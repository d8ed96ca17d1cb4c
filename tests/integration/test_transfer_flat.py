"""Nothing is held longer than it is needed: a few hundred transfers, and leaks that must show.

tests/soak/test_transfer_flat.py does the same over ten thousand.
"""

from collections.abc import Iterator

import pytest

from tests.flat.growth import GIVEN_UP, grown
from tests.flat.ranks import LANES, Ranks

TRANSFERS, RECONNECTS = 300, 5
LEAKING_TRANSFERS = 100
WARM_UP = 100, 4
# What each leak must show in; "transfers" and "reconnects" are what it takes to make it leak.
LEAKS = {
    "buffer": ("stream", "transfers", {"receive shared mappings", "receive shared KiB"}),
    "heap": ("mapped", "transfers", {"receive resident KiB"}),
    "object": ("ucx-shm", "transfers", {"receive objects Incoming", "receive objects Coverage"}),
    "descriptor": ("ucx-tcp", "transfers", {"receive descriptors"}),
    "thread": ("stream", "transfers", {"receive threads"}),
    "lease": ("mapped", "transfers", {"send leases", "send lease words"}),
    "slot": ("ucx-shm", "transfers", {"send slots sending"}),
    "socket": ("stream", "reconnects", {"receive descriptors", "send descriptors"}),
    "worker": ("ucx-shm", "reconnects", {"receive objects Worker", "send descriptors"}),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.mark.parametrize("lane", LANES)
def test_nothing_grows_over_transfers_and_reconnects(ranks: Ranks, lane: str) -> None:
    ranks.start(LANES[lane])
    ranks.warm_up(*WARM_UP)
    transfers, reconnects = ranks.watch_transfers(TRANSFERS), ranks.watch_reconnects(RECONNECTS)
    ranks.stop()
    ucx_links = RECONNECTS if LANES[lane].lane == "ucx" else 0
    for role in ("send", "receive"):
        assert grown(transfers[role]) == []
        assert grown(reconnects[role], ucx_links) == []


@pytest.mark.parametrize("leak", LEAKS)
def test_planted_leak_shows(ranks: Ranks, leak: str) -> None:
    lane, when, shows = LEAKS[leak]
    ranks.start(LANES[lane])
    ranks.warm_up(*WARM_UP)
    ranks.plant(leak)
    if when == "transfers":
        watched = ranks.watch_transfers(LEAKING_TRANSFERS)
    else:
        watched = ranks.watch_reconnects(RECONNECTS)
    ranks.stop()
    found = {f"{role} {each.measure}" for role, held in watched.items() for each in grown(held)}
    assert shows <= found


def test_what_ucx_keeps_is_allowed_for_links_given_up_and_nothing_else() -> None:
    links = [0, 0, 0, 100, 200, 200, 200]
    kept = [{"resident KiB": 1000.0 + 9 * count} for count in links]
    counted = [{**held, GIVEN_UP: count} for held, count in zip(kept, links, strict=True)]
    assert grown(counted, ucx_links_ended=200) == []
    assert [each.measure for each in grown(kept)] == ["resident KiB"]
    assert [each.measure for each in grown(counted)] == [GIVEN_UP]
