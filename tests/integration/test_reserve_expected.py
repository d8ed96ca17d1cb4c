"""The router learns how long answers get, and decode takes more of them at once than fit whole."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, free_port
from tests.integration.conftest import Reference, reference
from tests.integration.test_carried import metric
from tests.integration.test_ranks import prompt_of

FLAGS = ("--dtype", "float32", "--block-size", "8")
# The memory holds 256 tokens.
TINY = ("--kv-memory-mib", "1", "--kv-overcommit", "4", "--max-sequences", "16")
PROMPT, MOST = 20, 120
METRICS = free_port()
AT_ONCE_IF_WHOLE = 256 // (PROMPT + MOST)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt whose answer ends with the first token that is `stop`, or is as long as can be."""

    prompt: list[int]
    stop: int
    answer: list[int]


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(MODEL_DIR)


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    logs = tmp_path_factory.mktemp("tight")
    more = {"decode": TINY}
    pace = ("--heartbeat-interval-s", "0.05")
    router = ("--reserve", "expected", *pace, "--metrics-port", str(METRICS))
    with Cluster(MODEL_DIR, logs, *FLAGS, router_flags=router, more_flags=more) as cluster:
        yield cluster


def question(expected: Reference, seed: int, *, is_long: bool = False) -> Question:
    prompt = prompt_of(PROMPT, seed)
    tokens = expected.tokens(prompt, MOST if is_long else 12, temperature=0.9, seed=11)
    if is_long:
        never = next(token for token in range(300) if token not in tokens)
        return Question(prompt=prompt, stop=never, answer=tokens)
    return Question(prompt=prompt, stop=tokens[-1], answer=tokens[: tokens.index(tokens[-1]) + 1])


def ask(cluster: Cluster, asked: Question) -> list[int]:
    with cluster.client() as client:
        done = client.complete(
            asked.prompt,
            max_new_tokens=MOST,
            ignore_eos=True,
            stop_token_ids=[asked.stop],
            timeout_s=60,
            temperature=0.9,
            seed=11,
        )
    return list(done.token_ids)


class Watch:
    """The most sequences that decode says it runs, and the highest risk, while requests run."""

    def __init__(self, cluster: Cluster) -> None:
        self.running, self.risk = 0, 0.0
        self._cluster = cluster
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        with self._cluster.client() as client:
            while not self._is_over.wait(0.005):
                status = client.status()
                [decode] = [one for one in status.instances if one.role == "decode"]
                self.running = max(self.running, decode.running)
                self.risk = max(self.risk, decode.overcommit_risk)


def test_more_answers_than_would_fit_whole_run_at_once_once_their_length_is_known(
    tight: Cluster, expected: Reference
) -> None:
    known = [question(expected, seed) for seed in range(20)]
    with Watch(tight) as before, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda asked: ask(tight, asked), known)) == [q.answer for q in known]
    assert before.running <= AT_ONCE_IF_WHOLE
    assert before.risk == 0
    # The long ones outgrow what is expected, and not all of them fit.
    asked = [question(expected, 100 + seed, is_long=seed % 4 == 0) for seed in range(12)]
    with Watch(tight) as after, ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(lambda each: ask(tight, each), asked)) == [q.answer for q in asked]
    assert after.running > AT_ONCE_IF_WHOLE
    assert after.risk > 0
    with tight.client() as client:
        requests = client.status().requests
    assert requests.overcommitted >= len(asked)
    # One that is preempted in the very moment it needs more is booked whole, and so does not
    # outgrow that; the first of the long ones is not preempted.
    preempted = metric(METRICS, 'router_moved_requests_total{reason="preempted",way="prefill"}')
    assert requests.outgrown >= max(1, 3 - preempted)
    tight.wait_idle()
