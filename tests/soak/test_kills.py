"""Processes killed and stopped at random moments, again and again, under steady traffic.

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
CLIENTS = 6


def test_steady_traffic_survives_every_death(tmp_path: Path) -> None:
    print(f"TWINPOOL_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    expected = reference(MODEL_DIR)
    flags = ("--dtype", "float32", "--block-size", str(BLOCK))
    attempts: list[Attempt] = []
    stop = threading.Event()
    with Cluster(MODEL_DIR, tmp_path, *flags) as cluster:

        def traffic(rng: random.Random) -> None:
            while not stop.is_set():
                prompt = [rng.randrange(300) for _ in range(rng.choice([3, 40, 300, 1500]))]
                attempt = Attempt(cluster, prompt, rng.randint(2, 60))
                attempt.join()
                attempts.append(attempt)
                if attempt.error is not None:
                    time.sleep(0.05)  # as a client does that was told to come back

        clients = [
            threading.Thread(target=traffic, args=(random.Random(rng.random()),))
            for _ in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        try:
            for number in range(ROUNDS):
                role = rng.choice(["prefill", "decode", "router"])
                how = rng.choice(["kill", "stop", "term"])
                time.sleep(rng.uniform(0.2, 1.5))
                print(f"round {number}: {how} {role}", flush=True)
                if how == "stop":
                    cluster.signal(role, signal.SIGSTOP)
                    time.sleep(rng.choice([0.5, 4.0]))
                    cluster.signal(role, signal.SIGCONT)
                elif how == "kill":
                    cluster.kill(role)
                    cluster.start(role)
                else:
                    cluster.signal(role, signal.SIGTERM)
                    cluster.wait_exit(role)
                    cluster.start(role)
                cluster.wait_ready()
        finally:
            stop.set()
            for client in clients:
                client.join(60)
        assert not any(client.is_alive() for client in clients), "a client hangs"
        cluster.wait_idle()
        for attempt in attempts:
            attempt.check(expected)
    served = sum(attempt.error is None for attempt in attempts)
    print(f"{len(attempts)} requests, {served} served, the others told that it was unavailable")
    assert served >= ROUNDS
