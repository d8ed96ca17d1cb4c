"""Ranks killed and stopped in mid-transfer, twice for each side and lane; `make soak` goes on."""

import random
from collections.abc import Iterator
from signal import SIGKILL, SIGSTOP, Signals

import pytest

from tests.integration.cluster import some_slow
from tests.integration.kvtransfer.detection import Row, reported
from tests.integration.kvtransfer.kills import fill, limit_s
from tests.integration.kvtransfer.processes import WAYS, Ranks

pytestmark = pytest.mark.timeout(120)

ROUNDS = 2
# Silence is told sooner than in service, to be done sooner.
SETTINGS = {"heartbeat_s": 0.3}


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    with reported() as rows:
        yield rows


@pytest.mark.parametrize("number", [SIGKILL, SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", ["send", "receive"])
@pytest.mark.parametrize("lane", some_slow(WAYS, "ucx-tcp"))
def test_a_peer_lost_in_mid_transfer_is_noticed_and_harms_nobody(
    ranks: Ranks, rows: list[Row], lane: str, victim: str, number: Signals
) -> None:
    rows.append(row := Row(lane, victim, number, limit_s(number, SETTINGS)))
    with ranks.of(WAYS[lane]) as start:
        fill(row, start, ROUNDS, random.Random(1), SETTINGS)
    assert len(row.seconds) == ROUNDS
