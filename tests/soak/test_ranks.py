"""A prefill instance of several ranks under load: clients that leave, ranks that die.

TWINPOOL_SOAK_REQUESTS sets how many requests (500), TWINPOOL_SOAK_RANK_DEATHS how many ranks die
(20); TWINPOOL_TEST_SEED repeats a run.
"""

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, wait_until
from tests.integration.conftest import Reference, reference
from tests.integration.test_faults import SEED, Attempt
from tests.integration.test_ranks import FLAGS, LAYOUTS, other_ranks, prompt_of

REQUESTS = int(os.environ.get("TWINPOOL_SOAK_REQUESTS", "500"))
DEATHS = int(os.environ.get("TWINPOOL_SOAK_RANK_DEATHS", "20"))
CLIENTS = 8


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(MODEL_DIR)


@pytest.mark.parametrize("layout", ["cp3", "cp2 x tp2", "pp2 x cp2"])
def test_mixed_requests_with_clients_that_leave(
    layout: str, expected: Reference, tmp_path: Path
) -> None:
    print(f"TWINPOOL_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    heads = [prompt_of(length, seed) for seed, length in enumerate((100, 300, 800))]
    flags = {"prefill": (*LAYOUTS[layout], "--max-batched-tokens", "256")}
    whole: list[tuple[list[int], list[int]]] = []
    with Cluster(MODEL_DIR, tmp_path, *FLAGS, more_flags=flags) as cluster:

        def ask(number: int) -> None:
            mine = random.Random(f"{SEED} {number}")
            prompt = mine.choice([[], [], *heads]) + prompt_of(
                mine.choice([1, 20, 90, 200, 700]), number
            )
            leaves_after = mine.choice([None, None, None, 0, 1, 3])
            tokens: list[int] = []
            with cluster.client() as client:
                stream = client.generate(
                    prompt,
                    max_new_tokens=6,
                    ignore_eos=True,
                    timeout_s=120,
                    priority=mine.randint(-1, 1),
                    tenant=mine.choice("ab"),
                )
                for count, chunk in enumerate(stream):
                    if leaves_after is not None and count == leaves_after:
                        stream.close()
                        return
                    tokens.extend(chunk.token_ids)
            whole.append((prompt, tokens))

        with ThreadPoolExecutor(CLIENTS) as pool:
            for asked in [pool.submit(ask, number) for number in range(REQUESTS)]:
                asked.result()
        cluster.wait_idle()
    assert len(whole) > REQUESTS // 3
    for prompt, tokens in rng.sample(whole, min(len(whole), 100)):
        assert tokens == expected.tokens(prompt, 6)


def test_steady_traffic_survives_the_death_of_any_rank(expected: Reference, tmp_path: Path) -> None:
    print(f"TWINPOOL_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    flags = (*LAYOUTS["cp2"], "--max-batched-tokens", "128")
    attempts: list[Attempt] = []
    stop = threading.Event()
    with Cluster(
        MODEL_DIR, tmp_path, *FLAGS, prefills=("a", "b"), more_flags={"a": flags, "b": flags}
    ) as cluster:

        def traffic(rng: random.Random) -> None:
            while not stop.is_set():
                prompt = prompt_of(rng.choice([3, 40, 300, 1500]), rng.randrange(1 << 30))
                attempt = Attempt(cluster, prompt, rng.randint(2, 20))
                attempt.join()
                attempts.append(attempt)

        clients = [
            threading.Thread(target=traffic, args=(random.Random(rng.random()),))
            for _ in range(CLIENTS // 2)
        ]
        for client in clients:
            client.start()
        try:
            for number in range(DEATHS):
                time.sleep(rng.uniform(0.2, 1.5))
                name = rng.choice(["a", "b"])
                how = rng.choice([signal.SIGKILL, signal.SIGSTOP])
                first, others = cluster.pid(name), other_ranks(cluster, name)
                doomed = rng.choice([first, *others])
                print(f"round {number}: {how.name} rank {[first, *others].index(doomed)} of {name}")
                os.kill(doomed, how)
                if doomed == first and how is signal.SIGSTOP:
                    time.sleep(3.0)
                    cluster.kill(name)
                cluster.wait_exit(name)
                wait_until(partial(have_ended, others), "no rank is left")
                cluster.start(name)
                cluster.wait_ready()
        finally:
            stop.set()
            for client in clients:
                client.join()
        cluster.wait_idle()
    assert len(attempts) > DEATHS
    assert [attempt.error for attempt in attempts if attempt.error is not None] == []
    for attempt in rng.sample(attempts, min(len(attempts), 100)):
        attempt.check(expected)


def have_ended(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)
