"""A hundred thousand messages that are almost right, against live agents on every lane.

TWINPOOL_MUTATIONS sets how many in all; TWINPOOL_TEST_SEED repeats a run.
"""

import os
import random

import pytest

from kvtransfer.settings import Lane
from tests.unit.kvtransfer import agents
from tests.unit.kvtransfer.siege import besiege
from tests.unit.kvtransfer.siege_receiver import ReceiverSiege
from tests.unit.kvtransfer.siege_sender import SenderSiege

COUNT = int(os.environ.get("TWINPOOL_MUTATIONS", "100000"))
SEED = int(os.environ.get("TWINPOOL_TEST_SEED", random.SystemRandom().randrange(10**6)))


@pytest.mark.parametrize("siege", [ReceiverSiege, SenderSiege])
@pytest.mark.parametrize("lane", agents.LANES)
def test_no_message_makes_an_agent_do_harm(
    lane: Lane, siege: type[ReceiverSiege | SenderSiege], monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"TWINPOOL_TEST_SEED={SEED}")
    monkeypatch.setattr(agents, "LANE", lane)
    besiege(siege(lane, SEED), -(-COUNT // 6))
