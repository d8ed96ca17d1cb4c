"""A router is killed under streams of all kinds: their client goes on at another one, and every
answer is what it would have been.
"""

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from twinpool import Client, Completion, Message, Prompt, wire

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, wait_until
from tests.integration.conftest import BLOCK

SEED = os.environ.get("TWINPOOL_TEST_SEED") or str(random.randrange(2**32))
ROUNDS = 2
TOKENS = 128

CHAT = [Message("user", "Tell me of three rivers.")]
Asked = tuple[Prompt, dict[str, Any]]
# What is asked for, by what it shows.
ASKED: dict[str, Asked] = {
    "greedy": ("Once upon a time", {}),
    "seeded": ("Once upon a time", {"temperature": 0.9, "seed": 11, "top_p": 0.95}),
    "unseeded": ("The moon", {"temperature": 1.0}),
    "penalties": (
        "A list:",
        {
            "temperature": 0.7,
            "seed": 3,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.3,
            "min_new_tokens": 20,
        },
    ),
    "logprobs": ("In the beginning", {"temperature": 0.8, "seed": 5, "logprobs": 3}),
    "chat": (CHAT, {"temperature": 0.8, "seed": 9}),
    "token ids": ([5, 6, 7, 8] * 40, {"temperature": 1.2, "seed": 2, "top_k": 50}),
}


@dataclass
class Stream:
    """One answer, as it is read in a thread of its own."""

    client: Client
    asked: Asked
    tokens: int = 0
    answer: Completion | None = None
    seed: int | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        prompt, options = self.asked
        usual: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": True, "timeout_s": 60.0}
        try:
            with self.client.generate(prompt, **(usual | options)) as stream:
                chunks = []
                for chunk in stream:
                    chunks.append(chunk)
                    self.tokens += len(chunk.token_ids)
                self.answer = wire.completion(chunks)
                self.seed = stream.seed
        except Exception as exc:
            self.error = exc

    def result(self) -> Completion:
        self._thread.join()
        assert self.error is None, f"{self.asked[1]}: {self.error}"
        assert self.answer is not None
        return self.answer


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Cluster]]:
    """Two routers, each with its own instances of one model; the first one is asked first."""
    first, second = (
        Cluster(
            MODEL_DIR,
            tmp_path_factory.mktemp(name),
            *("--dtype", "float32", "--block-size", str(BLOCK)),
        )
        for name in ("first", "second")
    )
    # They take their seconds to start at the same time. The threads have to outlive the processes,
    # which end with the thread that started them.
    with ThreadPoolExecutor(2) as pool, ExitStack() as stack:
        list(pool.map(stack.enter_context, (first, second)))
        yield first, second


def has_come(streams: list[Stream], tokens: int) -> bool:
    """Whether streams have come to so many tokens together."""
    return sum(stream.tokens for stream in streams) >= tokens


def check(found: Completion, expected: Completion) -> None:
    """Everything that the caller gets is the same; log-probabilities up to rounding."""
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    assert found.usage == expected.usage
    assert len(found.logprobs) == len(expected.logprobs)
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours.chosen.token_id == theirs.chosen.token_id
        assert ours.chosen.logprob == pytest.approx(theirs.chosen.logprob, abs=1e-3)


def undisturbed(system: Cluster) -> tuple[dict[str, Asked], dict[str, Completion]]:
    """What is to be asked, and the answers of a router that nothing happens to."""
    with system.client() as client:
        whole = {name: Stream(client, asked) for name, asked in ASKED.items()}
        expected = {name: stream.result() for name, stream in whole.items()}
        # A stop string near the end, so that the router is likely to be lost before it.
        prompt, options = ASKED["seeded"]
        stop: Asked = (prompt, options | {"stop": expected["seeded"].text[-40:-30]})
        expected["stop"] = Stream(client, stop).result()
    assert expected["stop"].finish_reason == "stop"
    return ASKED | {"stop": stop}, expected


def test_router_killed_at_any_moment_is_not_seen_in_an_answer(
    systems: tuple[Cluster, Cluster],
) -> None:
    first, second = systems
    rng = random.Random(SEED)
    print(f"TWINPOOL_TEST_SEED={SEED}")
    asked, expected = undisturbed(second)
    for _ in range(ROUNDS):
        with Client([first.address, second.address]) as client:
            streams = {name: Stream(client, one) for name, one in asked.items()}
            enough = int(rng.uniform(0.0, 0.6) * TOKENS * len(streams))
            wait_until(partial(has_come, list(streams.values()), enough), "some tokens")
            first.kill("router")
            answers = {name: stream.result() for name, stream in streams.items()}
        went_on = sum(answer.stats.moves + answer.stats.retries for answer in answers.values())
        print(f"after {enough} tokens {went_on} of {len(answers)} answers went on elsewhere")
        assert went_on > 0
        prompt, options = asked["unseeded"]
        with second.client() as other:
            again = Stream(other, (prompt, options | {"seed": streams["unseeded"].seed}))
            expected["unseeded"] = again.result()
        for name, answer in answers.items():
            check(answer, expected[name])
        second.wait_idle()
        first.start("router")
        first.wait_ready()
    assert "goes on after" in second.log("router")
