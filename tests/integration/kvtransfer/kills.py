"""Rounds in which one side of a KV transfer is killed or stopped while it runs.

Owns the order of a round and what must hold after it. The survivor lives through all rounds of a
row; only victims are started anew, each in the place and with the name of the one before.
"""

import random
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from kvtransfer import TransferSettings
from tests.integration.kvtransfer.detection import Row
from tests.integration.kvtransfer.processes import (
    INSTANCES,
    LAYERS,
    RankProcess,
    Start,
    begin,
    join,
)
from tests.integration.kvtransfer.rank import TOKEN_BYTES

TOKENS = 24_000
SEQUENCE_BYTES = TOKENS * LAYERS * TOKEN_BYTES
# Victims that are stopped at a time: silence takes seconds to tell from slowness.
STOPPED_AT_ONCE = 10
KILLED_LIMIT_S = 1.0
# How often an agent that has transfers looks at the clock.
TICK_S = 0.1
# A multiple of what is hoped for, after which a survivor counts as hanging.
PATIENCE = 2.0
# How long it takes until a command has reached an agent.
COMMAND_S = 0.001
# How long a victim that goes on is given to do harm.
HARM_S = 0.3


def limit_s(number: signal.Signals, settings: dict[str, Any]) -> float:
    """Return within which time a survivor should have noticed."""
    if number is signal.SIGKILL:
        return KILLED_LIMIT_S
    return TransferSettings(**settings).silence_s + TICK_S


def fill(row: Row, start: Start, rounds: int, rng: random.Random, settings: dict[str, Any]) -> None:
    """Kill or stop as many victims as asked for; `settings` are the agents'."""
    rank = partial(start, tokens=TOKENS, settings=settings)
    (_kill if row.signal is signal.SIGKILL else _stop)(row, rank, rounds, rng)


def _kill(row: Row, start: Start, rounds: int, rng: random.Random) -> None:
    stage = Stage(row, start, rng, places=1)
    for _ in range(rounds):
        victim = stage.fresh(0)
        stage.works(victim, 0)
        struck = stage.strike(victim, 0)
        stage.all_notice([struck])
        stage.survivor.holds_nothing(0)
        victim.close()
    stage.works(stage.fresh(0), 0)
    stage.survivor.holds_nothing(1)


def _stop(row: Row, start: Start, rounds: int, rng: random.Random) -> None:
    places = min(rounds, STOPPED_AT_ONCE)
    stage = Stage(row, start, rng, places)
    victims = [stage.fresh(place) for place in range(places)]
    stage.all_work(victims)
    for done in range(0, rounds, places):
        hit = range(min(places, rounds - done))
        struck = [stage.strike(victims[place], place) for place in hit]
        stage.all_notice(struck)
        victims[: len(hit)] = [stage.fresh(place) for place in hit]
        stage.all_work(victims)  # while the old ones stand still
        for each in struck:
            each.victim.signal(signal.SIGCONT)
        time.sleep(HARM_S)
        stage.all_stand(victims)
        for each in struck:
            stage.gives_up(each)
        stage.all_work(victims)  # while they are back
        for each in struck:
            each.victim.close()
    stage.all_work(victims)
    stage.survivor.holds_nothing(places)


@dataclass(frozen=True, kw_only=True)
class Struck:
    """A victim that was sent its signal in the midst of a transfer."""

    victim: RankProcess
    place: int
    transfer_id: int
    ready_bytes: int
    at: float


class Stage:
    """One survivor, and a victim in each of its places."""

    def __init__(self, row: Row, start: Start, rng: random.Random, places: int) -> None:
        self._row, self._start, self._rng = row, start, rng
        self._ids, self._epochs = count(1), count(7)
        self._receives = row.victim == "send"
        role = "receive" if self._receives else "send"
        self.survivor = start(role, sequences=places if self._receives else 1)
        # How long the transfers took that nobody disturbed.
        self._took_s: list[float] = []
        self._bytes = 0

    def fresh(self, place: int) -> RankProcess:
        """Start and connect a victim in a later epoch of the one that had its place."""
        role = self._row.victim
        name = f"{INSTANCES[role]}-{place}"
        victim = self._start(role, instance=name, epoch=next(self._epochs))
        join(*self._pair(victim))
        return victim

    def _pair(self, victim: RankProcess) -> tuple[RankProcess, RankProcess]:
        return (victim, self.survivor) if self._receives else (self.survivor, victim)

    def _sequence(self, place: int) -> int:
        """Which of the receiver's sequences is written to by a victim's transfers."""
        return place if self._receives else 0

    # ------------------------------------------------------------------------------ what works

    def works(self, victim: RankProcess, place: int) -> None:
        """Move a sequence, byte for byte, into the blocks of the one before it."""
        sender, receiver = self._pair(victim)
        begin(sender, receiver, transfer_id := next(self._ids), self._sequence(place))
        sender.do("ready", id=transfer_id, layers=[0, LAYERS])
        sender.find(event="Completed", id=transfer_id)
        done = receiver.find(event="Completed", id=transfer_id)
        self._took_s.append(done["seconds"])
        self._stands(receiver, self._sequence(place))

    def all_work(self, victims: Sequence[RankProcess]) -> None:
        """Move a sequence from or to each."""
        for place, victim in enumerate(victims):
            self.works(victim, place)

    def all_stand(self, victims: Sequence[RankProcess]) -> None:
        """Check what has been received before, byte for byte, without moving it again."""
        for place, victim in enumerate(victims):
            self._stands(self._pair(victim)[1], self._sequence(place))

    @staticmethod
    def _stands(receiver: RankProcess, sequence: int) -> None:
        found = receiver.check(sequence)
        assert all(found.values()), f"{receiver.instance}: {found}"

    # ----------------------------------------------------------------------------- what breaks

    def strike(self, victim: RankProcess, place: int) -> Struck:
        """Begin a transfer and send the signal at a random moment of it.

        Every second one could complete; the others lack a layer, so that they are under way still.
        """
        sender, receiver = self._pair(victim)
        begin(sender, receiver, transfer_id := next(self._ids), self._sequence(place))
        layers = self._rng.choice([LAYERS - 1, LAYERS])
        sender.do("ready", id=transfer_id, layers=[0, layers])
        time.sleep(self._rng.uniform(0.0, COMMAND_S + statistics.median(self._took_s)))
        at = victim.signal(self._row.signal)
        ready_bytes = layers * TOKENS * TOKEN_BYTES
        return Struck(
            victim=victim, place=place, transfer_id=transfer_id, ready_bytes=ready_bytes, at=at
        )

    def all_notice(self, struck: Sequence[Struck]) -> None:
        """Wait for the survivor's word on each, note how long it took, and check what it has."""
        downs = sorted(
            [(self._notices(each), each) for each in struck], key=lambda one: one[0]["at"]
        )
        for down, each in downs:
            # All other transfers of the connection were whole sequences.
            moved = (down["bytes"] - self._bytes) % SEQUENCE_BYTES
            self._row.under_way += moved not in (0, each.ready_bytes)
            self._bytes = down["bytes"]

    def _notices(self, struck: Struck) -> dict[str, Any]:
        down = self.survivor.find(
            event="PeerDown",
            instance=struck.victim.instance,
            since=struck.at,
            patience_s=PATIENCE * self._row.limit_s,
        )
        ended = self.survivor.find(event=("Failed", "Completed"), id=struck.transfer_id)
        # A transfer that was over by then says nothing of its peer.
        said = ended if ended["event"] == "Failed" else down
        self._row.seconds.append(said["at"] - struck.at)
        self._row.outcomes[ended.get("error", ended["event"])] += 1
        if self._receives:
            self._check_received(ended, struck.place)
        else:
            assert all(self.survivor.check().values())
        return down

    def _check_received(self, ended: dict[str, Any], place: int) -> None:
        found = self.survivor.check(place, ended.get("kept", ()))
        wanted = {"clean", "others", "kept"}
        if ended["event"] == "Completed":
            wanted.add("right")
        assert all(found[name] for name in wanted), f"{found} after {ended}"

    def gives_up(self, struck: Struck) -> None:
        """A victim that went on must itself have noticed, and have written nowhere else."""
        victim = struck.victim
        victim.find(event=("Failed", "Completed"), id=struck.transfer_id)
        victim.find(event="PeerDown", since=struck.at)
        if not self._receives:
            found = victim.check()
            assert {"clean", "others"} <= {name for name in found if found[name]}, found
        # The survivor has not said a second word on the transfer.
        assert self.survivor.said(id=struck.transfer_id) == 1
