"""Bytes that come late never reach the blocks' next sequence; without the protection they would."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvtransfer.settings import Lane
from tests.unit.kvtransfer import harm
from tests.unit.kvtransfer.late import ForeignBytes, Stage

ROUNDS = 15
# Without the protection the first harm shows within a few rounds; this many times that is enough.
ROUNDS_TO_HARM = 300


@contextmanager
def staged(lane: Lane, monkeypatch: pytest.MonkeyPatch, **settings: bool) -> Iterator[Stage]:
    stage = Stage(lane, **settings, seed=1)
    harm.worst_moments(monkeypatch, stage)
    try:
        yield stage
    finally:
        stage.close()


@pytest.mark.parametrize("checksum", [True, False], ids=["checksum", "plain"])
@pytest.mark.parametrize("long", [True, False], ids=["long-runs", "short-runs"])
def test_no_byte_of_a_sequence_shows_in_the_blocks_of_the_next(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, *, long: bool, checksum: bool
) -> None:
    with staged(lane, monkeypatch, long=long, checksum=checksum) as stage:
        stage.rounds(ROUNDS)
        stage.slots_become_whole()


@pytest.mark.parametrize("long", [True, False], ids=["long-runs", "short-runs"])
def test_without_its_protection_a_lane_would_let_foreign_bytes_through(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, *, long: bool
) -> None:
    if lane == "stream" and not long:
        pytest.skip("short runs leave their blocks when they are packed")
    with staged(lane, monkeypatch, long=long, checksum=False) as stage:
        harm.UNPROTECTED[lane](monkeypatch)
        if lane == "ucx":
            stage.endings = ("cut",)  # only a message that outlives its link finds a foreign slot
        with pytest.raises(ForeignBytes):
            stage.rounds(ROUNDS_TO_HARM)


@pytest.mark.parametrize("lane", ["stream"], indirect=True)
@pytest.mark.parametrize("checksum", [True, False], ids=["checksum", "plain"])
def test_what_a_sender_takes_back_does_not_count_as_arrived(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, *, checksum: bool
) -> None:
    with staged(lane, monkeypatch, long=True, checksum=checksum) as stage:
        stage.take_back()
