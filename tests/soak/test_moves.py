"""One instance of two of each role goes away at a time, again and again: no client ever notices.

TWINPOOL_SOAK_ROUNDS sets how often (40); TWINPOOL_TEST_SEED repeats a run.
"""

import os
import random
import signal
import threading
import time
from pathlib import Path

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster
from tests.integration.conftest import BLOCK, reference
from tests.integration.test_faults import SEED, Attempt

ROUNDS = int(os.environ.get("TWINPOOL_SOAK_ROUNDS", "40"))
CLIENTS = 4
# The reference answers one request after another.
CHECKED = 100
PREFILLS, DECODES = ("p1", "p2"), ("d1", "d2")


def test_no_answer_ends_early_while_one_of_each_role_lives(tmp_path: Path) -> None:
    print(f"TWINPOOL_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    expected = reference(MODEL_DIR)
    flags = ("--dtype", "float32", "--block-size", str(BLOCK), "--drain-timeout-s", "2")
    attempts: list[Attempt] = []
    stop = threading.Event()
    with Cluster(MODEL_DIR, tmp_path, *flags, prefills=PREFILLS, decodes=DECODES) as cluster:

        def traffic(rng: random.Random) -> None:
            while not stop.is_set():
                prompt = [rng.randrange(300) for _ in range(rng.choice([3, 40, 300, 1500]))]
                attempt = Attempt(cluster, prompt, rng.choice([2, 40, 200, 500]))
                attempt.join()
                attempts.append(attempt)

        clients = [
            threading.Thread(target=traffic, args=(random.Random(rng.random()),))
            for _ in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        try:
            for number in range(ROUNDS):
                name = rng.choice([*PREFILLS, *DECODES, *DECODES])
                how = rng.choice(["kill", "stop", "term"])
                time.sleep(rng.uniform(0.2, 1.5))
                print(f"round {number}: {how} {name}", flush=True)
                if how == "stop":
                    cluster.signal(name, signal.SIGSTOP)
                    time.sleep(rng.choice([0.5, 4.0]))
                    cluster.signal(name, signal.SIGCONT)
                elif how == "kill":
                    cluster.kill(name)
                    cluster.start(name)
                else:
                    cluster.signal(name, signal.SIGTERM)
                    cluster.wait_exit(name)
                    cluster.start(name)
                cluster.wait_ready()
        finally:
            stop.set()
            for client in clients:
                client.join(60)
        assert not any(client.is_alive() for client in clients), "a client hangs"
        cluster.wait_idle()
        for attempt in attempts:
            assert attempt.error is None, attempt.error
            assert len(attempt.tokens) == attempt.wanted
    for attempt in rng.sample(attempts, min(len(attempts), CHECKED)):
        attempt.check(expected)
    moves = sum(attempt.stats.moves for attempt in attempts if attempt.stats is not None)
    print(f"{len(attempts)} requests, {moves} moves")
    assert moves > 0
