"""Every role is killed, stopped and restarted at random: each request's history is the undisturbed.

Two routers, two prefill and two decode instances, of which one of each is left alone at any moment.
So no client may see an error: each answer ends once, its tokens come in order, none is lost, none
doubled, and all are those of a run that nothing happened to.

TWINPOOL_SOAK_SCHEDULES sets how many schedules (200); TWINPOOL_TEST_SEED repeats a run.
"""

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from twinpool import Client, Completion

from tests.integration.conftest import BLOCK
from tests.integration.test_faults import SEED
from tests.integration.test_router_loss import ASKED, Asked, Stream, check, undisturbed
from tests.integration.test_routers import Pair

SCHEDULES = int(os.environ.get("TWINPOOL_SOAK_SCHEDULES", "200"))
STREAMS = 8
FLAGS = ("--dtype", "float32", "--block-size", str(BLOCK), "--drain-timeout-s", "3")
ROLES = {"router": ("router", "second"), "prefill": ("p0", "p1"), "decode": ("d0", "d1")}


@dataclass(frozen=True)
class Fault:
    """What happens to whom, in seconds from the start of the schedule, and for how long."""

    at_s: float
    name: str
    how: str
    for_s: float

    def strike(self, pair: Pair) -> None:
        match self.how:
            case "stop":
                pair.signal(self.name, signal.SIGSTOP)
                time.sleep(self.for_s)
                pair.signal(self.name, signal.SIGCONT)
            case "kill":
                pair.kill(self.name)
                time.sleep(self.for_s)
                pair.start(self.name)
            case _:
                pair.signal(self.name, signal.SIGTERM)
                pair.wait_exit(self.name)
                pair.start(self.name)


def schedule(rng: random.Random) -> list[Fault]:
    """One or two faults, of different roles where there are two."""
    return [
        Fault(
            at_s=rng.uniform(0.0, 1.2),
            name=rng.choice(ROLES[role]),
            how=rng.choice(("kill", "kill", "stop", "restart")),
            for_s=rng.choice((0.0, 0.3, 4.0)),
        )
        for role in rng.sample(list(ROLES), rng.choice((1, 1, 2)))
    ]


def run(pair: Pair, rng: random.Random, asked: dict[str, Asked]) -> dict[str, list[Stream]]:
    """Ask for answers of all kinds while a schedule's faults strike; the streams by kind."""
    faults = sorted(schedule(rng), key=lambda fault: fault.at_s)
    print(", ".join(f"{fault.how} {fault.name} at {fault.at_s:.2f} s" for fault in faults))
    addresses = list(pair.addresses.values())
    rng.shuffle(addresses)
    streams: dict[str, list[Stream]] = {}
    with Client(addresses) as client:
        for _ in range(STREAMS):
            name = rng.choice(list(asked))
            streams.setdefault(name, []).append(Stream(client, asked[name]))
            time.sleep(rng.uniform(0.0, 0.1))
        began = time.monotonic()
        for fault in faults:
            time.sleep(max(0.0, began + fault.at_s - time.monotonic()))
            fault.strike(pair)
        for of_kind in streams.values():
            for stream in of_kind:
                stream.result()
    return streams


def test_no_history_shows_any_fault(tmp_path: Path) -> None:
    print(f"TWINPOOL_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    with Pair(tmp_path, FLAGS, prefills=ROLES["prefill"], decodes=ROLES["decode"]) as pair:
        asked, expected = undisturbed(pair)
        answers: list[Completion] = []
        for number in range(SCHEDULES):
            print(f"schedule {number}: ", end="", flush=True)
            for name, streams in run(pair, rng, asked).items():
                for stream in streams:
                    answers.append(stream.result())
                    if name == "unseeded":
                        continue  # drawn anew each time
                    check(stream.result(), expected[name])
            pair.wait_ready()
            pair.wait_idle()
    assert ASKED.keys() <= asked.keys()
    moved = sum(answer.stats.moves + answer.stats.retries > 0 for answer in answers)
    print(f"{len(answers)} answers, {moved} of them moved or were tried again")
    assert moved > SCHEDULES / 4
