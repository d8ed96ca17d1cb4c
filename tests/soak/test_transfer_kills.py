"""Ranks killed and stopped at random moments of their transfers, on every lane, on either side.

TWINPOOL_TRANSFER_KILLS sets how often for each signal, side and lane (100), TWINPOOL_REPORT_DIR
where the times until the other side noticed are kept; TWINPOOL_TEST_SEED repeats a run.
"""

import os
import random
from collections.abc import Iterator
from signal import SIGKILL, SIGSTOP, Signals

import pytest

from tests.integration.kvtransfer.detection import Row, reported
from tests.integration.kvtransfer.kills import fill, limit_s
from tests.integration.kvtransfer.processes import WAYS, Ranks

KILLS = int(os.environ.get("TWINPOOL_TRANSFER_KILLS", "100"))
SEED = int(os.environ.get("TWINPOOL_TEST_SEED", str(random.SystemRandom().randrange(1 << 30))))


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    print(f"\nTWINPOOL_TEST_SEED={SEED}")
    with reported() as rows:
        yield rows


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [SIGKILL, SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", ["send", "receive"])
@pytest.mark.parametrize("lane", WAYS)
def test_a_peer_lost_in_mid_transfer_is_noticed_and_harms_nobody(
    rows: list[Row], lane: str, victim: str, number: Signals
) -> None:
    rows.append(row := Row(lane, victim, number, limit_s(number, {})))
    with Ranks() as ranks, ranks.of(WAYS[lane]) as start:
        fill(row, start, KILLS, random.Random(f"{SEED} {row.name}"), {})
    assert len(row.seconds) == KILLS
