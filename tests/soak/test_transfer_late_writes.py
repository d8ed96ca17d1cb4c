"""Late writes again and again: no byte of a sequence in the blocks of the next one.

TWINPOOL_LATE_ROUNDS sets how often on each lane (1,000); TWINPOOL_TEST_SEED repeats a run.
"""

import os
import random

import pytest

from kvtransfer.settings import Lane
from tests.unit.kvtransfer import harm
from tests.unit.kvtransfer.agents import LANES
from tests.unit.kvtransfer.late import Stage

ROUNDS = int(os.environ.get("TWINPOOL_LATE_ROUNDS", "1000"))
SEED = int(os.environ.get("TWINPOOL_TEST_SEED", random.SystemRandom().randrange(10**6)))


@pytest.mark.parametrize("checksum", [True, False], ids=["checksum", "plain"])
@pytest.mark.parametrize("long", [True, False], ids=["long-runs", "short-runs"])
@pytest.mark.parametrize("lane", LANES)
def test_no_byte_of_a_sequence_shows_in_the_blocks_of_the_next(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, *, long: bool, checksum: bool
) -> None:
    print(f"TWINPOOL_TEST_SEED={SEED}")
    stage = Stage(lane, long=long, checksum=checksum, seed=SEED)
    harm.worst_moments(monkeypatch, stage)
    stage.rounds(-(-ROUNDS // 4))
    stage.slots_become_whole()
    stage.close()
