"""Processes die at any moment: nothing hangs, no token is wrong, every block comes back."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from twinpool import RequestStats
from twinpool.errors import Unavailable

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, wait_until
from tests.integration.conftest import BLOCK, Reference, reference

REQUESTS = 20
SEED = int(os.environ.get("TWINPOOL_TEST_SEED", random.SystemRandom().randrange(10**6)))


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(MODEL_DIR)


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    logs = tmp_path_factory.mktemp("fragile")
    flags = ("--dtype", "float32", "--block-size", str(BLOCK))
    with Cluster(MODEL_DIR, logs, *flags) as cluster:
        yield cluster


class Attempt:
    """One request in a thread of its own, and how it ended."""

    def __init__(self, cluster: Cluster, prompt: list[int], tokens: int) -> None:
        self.prompt = prompt
        self.wanted = tokens
        self.tokens: list[int] = []
        self.error: Exception | None = None
        self.stats: RequestStats | None = None
        self._cluster = cluster
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._cluster.client() as client:
                for chunk in client.generate(
                    self.prompt, max_new_tokens=self.wanted, ignore_eos=True, timeout_s=60
                ):
                    self.tokens.extend(chunk.token_ids)
                    self.stats = chunk.stats
        except Exception as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive(), "a request hangs"

    def check(self, expected: Reference) -> None:
        right = expected.tokens(self.prompt, self.wanted)
        assert self.tokens == right[: len(self.tokens)]
        if self.error is None:
            assert len(self.tokens) == self.wanted
        else:
            assert isinstance(self.error, Unavailable), self.error


@pytest.mark.parametrize("role", ["prefill", "decode", "router"])
def test_killed_process_hangs_nothing_and_leaks_nothing(
    fragile: Cluster, expected: Reference, role: str
) -> None:
    rng = random.Random(f"{SEED} {role}")
    print(f"TWINPOOL_TEST_SEED={SEED}")
    attempts = []
    kill_after = rng.randrange(REQUESTS)
    for number in range(REQUESTS):
        prompt = [rng.randrange(300) for _ in range(rng.choice([3, 40, 300, 1500]))]
        attempts.append(Attempt(fragile, prompt, rng.randint(2, 40)))
        time.sleep(rng.uniform(0, 0.02))
        if number == kill_after:
            fragile.kill(role)
            fragile.start(role)
    for attempt in attempts:
        attempt.join()
    for attempt in attempts:
        attempt.check(expected)
        if role != "router" and attempt.tokens:
            assert attempt.error is None  # what has begun goes on
    fragile.wait_ready()
    fragile.wait_idle()
    after = Attempt(fragile, [1, 2, 3, 4], 8)
    after.join()
    assert after.error is None
    after.check(expected)


def test_stopped_decode_is_given_up_and_taken_back(fragile: Cluster, expected: Reference) -> None:
    attempt = Attempt(fragile, [5, 6, 7], 400)
    wait_until(lambda: bool(attempt.tokens), "the first token")
    fragile.signal("decode", signal.SIGSTOP)
    with fragile.client() as client:
        wait_until(lambda: len(client.status().instances) == 1, "decode is given up")
    fragile.signal("decode", signal.SIGCONT)
    attempt.join()
    assert attempt.error is None
    attempt.check(expected)
    fragile.wait_ready()
    fragile.wait_idle()


def test_sigterm_finishes_what_runs(fragile: Cluster, expected: Reference) -> None:
    attempt = Attempt(fragile, [8, 9, 10], 200)
    wait_until(lambda: bool(attempt.tokens), "the first token")
    fragile.signal("decode", signal.SIGTERM)
    attempt.join()
    assert attempt.error is None
    attempt.check(expected)
    assert fragile.wait_exit("decode") == 0
    fragile.start("decode")
    fragile.wait_ready()
    fragile.wait_idle()


def test_left_stream_frees_its_blocks(fragile: Cluster) -> None:
    with fragile.client() as client:
        for count, _ in enumerate(client.generate([1, 2, 3], max_new_tokens=500, ignore_eos=True)):
            if count == 3:
                break
    fragile.wait_idle()


def test_deadline_frees_its_blocks(fragile: Cluster) -> None:
    from twinpool.errors import DeadlineExceeded

    with fragile.client() as client, pytest.raises(DeadlineExceeded):
        client.complete([1, 2, 3], max_new_tokens=7000, ignore_eos=True, timeout_s=0.3)
    fragile.wait_idle()


def test_logs_hold_no_tokens(fragile: Cluster, tmp_path: Path) -> None:
    marker = "Xylophonequartz"
    with fragile.client() as client:
        client.complete(marker, max_new_tokens=2)
    for role in ("router", "prefill", "decode"):
        assert marker not in fragile.log(role)
