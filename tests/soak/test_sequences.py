"""Thousands of sequences come, stop, are left and move: none is lost, none doubled, nothing leaks.

TWINPOOL_SOAK_SEQUENCES sets how many (2,000); TWINPOOL_TEST_SEED repeats a run.
"""

import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinpool.errors import TwinpoolError

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster
from tests.integration.conftest import BLOCK, reference
from tests.integration.test_faults import SEED

SEQUENCES = int(os.environ.get("TWINPOOL_SOAK_SEQUENCES", "2000"))
CLIENTS = 12
# The reference answers one request after another.
CHECKED = 150
FLAGS = ("--dtype", "float32", "--block-size", str(BLOCK), "--drain-timeout-s", "3")
DECODES = {"d1": ("--dp", "2", "--ep", "2"), "d2": ()}


@dataclass
class Sequence:
    """One request, and what came of it. `leaves_after` tokens its client goes away."""

    prompt: list[int]
    options: dict[str, Any]
    leaves_after: int | None
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    counted: int = 0
    moves: int = 0
    error: TwinpoolError | None = None

    @classmethod
    def drawn(cls, rng: random.Random) -> "Sequence":
        """Return a request like some that people make."""
        tokens = rng.choice([2, 8, 40, 120])
        options: dict[str, Any] = {"max_new_tokens": tokens, "ignore_eos": True}
        if rng.random() < 0.3:
            options["stop_token_ids"] = [rng.randrange(300) for _ in range(20)]
        prompt = [rng.randrange(300) for _ in range(rng.choice([3, 40, 40, 300, 900]))]
        leaves = rng.randrange(tokens) if rng.random() < 0.2 else None
        return cls(prompt, options, leaves)

    def run(self, cluster: Cluster) -> None:
        try:
            with cluster.client() as client:
                for chunk in client.generate(self.prompt, timeout_s=120, **self.options):
                    self.tokens.extend(chunk.token_ids)
                    self.finish = chunk.finish_reason
                    if chunk.usage is not None:
                        self.counted = chunk.usage.completion_tokens
                    if chunk.stats is not None:
                        self.moves = chunk.stats.moves
                    if self.leaves_after is not None and len(self.tokens) > self.leaves_after:
                        return
        except TwinpoolError as error:
            self.error = error

    def check(self) -> str:
        """Say how it ended; raises where that is not as it should be."""
        assert self.error is None, self.error
        if self.finish is None:
            assert self.leaves_after is not None
            return "left"
        assert self.counted == len(self.tokens)
        if self.finish == "length":
            assert len(self.tokens) == self.options["max_new_tokens"]
        else:
            assert self.tokens[-1] in self.options["stop_token_ids"]
        return self.finish


def test_thousands_of_sequences_come_and_go(tmp_path: Path) -> None:
    print(f"TWINPOOL_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    wanted = [Sequence.drawn(rng) for _ in range(SEQUENCES)]
    waiting = list(reversed(wanted))
    with Cluster(
        MODEL_DIR, tmp_path, *FLAGS, decodes=tuple(DECODES), more_flags=DECODES
    ) as cluster:

        def client() -> None:
            while True:
                try:
                    sequence = waiting.pop()
                except IndexError:
                    return
                sequence.run(cluster)

        clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for each in clients:
            each.start()
        while waiting:
            time.sleep(rng.uniform(2, 6))
            disturb(cluster, rng, len(waiting))
        for each in clients:
            each.join(120)
        assert not any(each.is_alive() for each in clients), "a client hangs"
        cluster.wait_ready()
        cluster.wait_idle()
    ends = Counter(sequence.check() for sequence in wanted)
    moves = sum(sequence.moves for sequence in wanted)
    print(f"{dict(ends)}, {moves} moves")
    assert set(ends) == {"left", "length", "stop"}
    assert moves > 0
    expected = reference(MODEL_DIR)
    for sequence in rng.sample(wanted, min(len(wanted), CHECKED)):
        right = expected.tokens(sequence.prompt, sequence.options["max_new_tokens"])
        assert sequence.tokens == right[: len(sequence.tokens)]


def disturb(cluster: Cluster, rng: random.Random, left: int) -> None:
    """Kill or drain one of the decode instances, and have it back."""
    name, how = rng.choice(list(DECODES)), rng.choice(["kill", "drain"])
    print(f"{left} sequences to come: {how} {name}", flush=True)
    if how == "kill":
        cluster.kill(name)
    else:
        cluster.signal(name, signal.SIGTERM)
        cluster.wait_exit(name)
    cluster.start(name)
    cluster.wait_ready()
