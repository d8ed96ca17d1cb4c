"""A decode instance goes away under answers that have begun: each goes on as if nothing was."""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from twinpool import Chunk, Completion
from twinpool.errors import DeadlineExceeded, TwinpoolError

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, wait_until
from tests.integration.conftest import BLOCK, Reference, reference
from text import Tokenizer, load_assets

TOKENS = 400
BEGUN = 30
DRAIN_S = 3
PROMPTS = ("Once upon a time", "The quick brown fox", "In the beginning")
# Seeds whose numbers all fall far from where one token's share ends and the next one's begins: by
# much more than what rounding in another batch moves that.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"ignore_eos": True},
    "seeded": {"ignore_eos": True, "temperature": 2.0, "top_k": 12, "top_p": 0.95, "seed": 23},
    "penalties": {
        "ignore_eos": True,
        "temperature": 1.5,
        "top_k": 12,
        "seed": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
    },
    "repetition": {"ignore_eos": True, "repetition_penalty": 1.2},
    "logprobs": {"ignore_eos": True, "temperature": 1.5, "top_k": 12, "seed": 6, "logprobs": 3},
    "min_new_tokens": {"min_new_tokens": 250, "temperature": 2.0, "top_k": 12, "seed": 6},
}


class Stream:
    """One request in a thread of its own, and what came of it."""

    def __init__(self, cluster: Cluster, prompt: str, timeout_s: float = 60, **options: Any):
        self.chunks: list[Chunk] = []
        self.error: TwinpoolError | None = None
        self._leave = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(cluster, prompt), kwargs={"timeout_s": timeout_s, **options}
        )
        self._thread.start()

    def _run(self, cluster: Cluster, prompt: str, **options: Any) -> None:
        try:
            with cluster.client() as client:
                self._answer = client.generate(prompt, **options)
                for chunk in self._answer:
                    self.chunks.append(chunk)
                    if self._leave.is_set():
                        return
        except TwinpoolError as error:
            self.error = error

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for chunk in list(self.chunks) for token in chunk.token_ids)

    @property
    def moves(self) -> int:
        stats = self.chunks[-1].stats
        assert stats is not None
        return stats.moves

    def cancel(self) -> None:
        """Have the client leave, also where it waits for a token; the answer has begun."""
        self._answer.close()

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "a request hangs"

    def check(self, expected: Completion) -> None:
        """The answer is what it is without any disturbance."""
        assert self.error is None, self.error
        assert self.token_ids == expected.token_ids
        assert "".join(chunk.text for chunk in self.chunks) == expected.text
        last = self.chunks[-1]
        assert (last.finish_reason, last.usage) == (expected.finish_reason, expected.usage)
        positions = [position for chunk in self.chunks for position in chunk.logprobs]
        assert len(positions) == len(expected.logprobs)
        for found, right in zip(positions, expected.logprobs, strict=True):
            assert found.chosen.token_id == right.chosen.token_id
            assert found.chosen.logprob == pytest.approx(right.chosen.logprob, abs=1e-3)
            assert [t.logprob for t in found.top] == pytest.approx(
                [t.logprob for t in right.top], abs=1e-3
            )


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = ("--dtype", "float32", "--block-size", str(BLOCK), "--drain-timeout-s", str(DRAIN_S))
    with Cluster(MODEL_DIR, tmp_path_factory.mktemp("twins"), *flags, decodes=("a", "b")) as made:
        yield made


Wanted = dict[str, tuple[str, dict[str, Any], Completion]]


@pytest.fixture(scope="module")
def wanted(twins: Cluster) -> Wanted:
    """Requests of all kinds and their answers while nothing disturbs them."""
    asked = {
        kind: (PROMPTS[number % len(PROMPTS)], {"max_new_tokens": TOKENS, **options})
        for number, (kind, options) in enumerate(KINDS.items())
    }

    def answer(prompt: str, options: dict[str, Any]) -> Completion:
        with twins.client() as client:
            return client.complete(prompt, timeout_s=60, **options)

    prompt, options = asked["seeded"]
    asked["stop string"] = (prompt, {**options, "stop": [late_words(answer(prompt, options).text)]})
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda each: answer(*each), asked.values()))
    return {
        kind: (*each, right) for (kind, each), right in zip(asked.items(), answers, strict=True)
    }


def late_words(text: str) -> str:
    """Some characters of the text that come up first beyond its middle."""
    for start in range(len(text) * 6 // 10, len(text) - 8):
        if text.find(words := text[start : start + 8]) == start:
            return words
    raise AssertionError("the answer says nothing new in its second half")


def begin_all(cluster: Cluster, wanted: Wanted) -> dict[str, Stream]:
    """Start a request of each kind; return when all of their answers have begun."""
    streams = {kind: Stream(cluster, prompt, **o) for kind, (prompt, o, _) in wanted.items()}
    wait_until(
        lambda: all(len(stream.token_ids) >= BEGUN for stream in streams.values()), "tokens of all"
    )
    return streams


def check_all(streams: dict[str, Stream], wanted: Wanted) -> None:
    for stream in streams.values():
        stream.join()
    for kind, stream in streams.items():
        stream.check(wanted[kind][2])


def test_undisturbed_answer_is_the_single_process_run(wanted: Wanted) -> None:
    single: Reference = reference(MODEL_DIR)
    prompt, _, right = wanted["greedy"]
    ids = Tokenizer(load_assets(MODEL_DIR)).encode(prompt)
    assert list(right.token_ids) == single.tokens(ids, TOKENS)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_decode_is_not_seen_by_any_client(
    twins: Cluster, wanted: Wanted, how: signal.Signals
) -> None:
    streams = begin_all(twins, wanted)
    name = twins.busiest("a", "b")
    twins.signal(name, how)
    check_all(streams, wanted)
    assert any(stream.moves for stream in streams.values())
    if how is signal.SIGKILL:
        twins.kill(name)
        twins.start(name)
    else:
        twins.signal(name, signal.SIGCONT)
    twins.wait_ready()
    twins.wait_idle()


def test_both_decodes_lost_one_after_the_other_and_back(twins: Cluster, wanted: Wanted) -> None:
    streams = begin_all(twins, wanted)
    for name in ("a", "b", "a"):
        twins.kill(name)
        twins.start(name)
        told = {kind: len(stream.token_ids) for kind, stream in streams.items()}
        wait_until(
            lambda told=told: all(  # type: ignore[misc]
                s.chunks[-1].finish_reason or len(s.token_ids) > told[kind] + 5
                for kind, s in streams.items()
            ),
            "all go on",
        )
    check_all(streams, wanted)
    assert any(stream.moves > 1 for stream in streams.values())
    twins.wait_ready()
    twins.wait_idle()


def test_draining_decode_is_left_at_once_by_long_answers(twins: Cluster) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 1000,
        "ignore_eos": True,
        "temperature": 0.7,
        "seed": 3,
    }
    with twins.client() as client:
        right = client.complete(PROMPTS[0], timeout_s=60, **options)
    streams = [Stream(twins, PROMPTS[0], **options) for _ in range(4)]
    wait_until(lambda: all(len(s.token_ids) >= BEGUN for s in streams), "tokens of all")
    name = twins.busiest("a", "b")
    twins.signal(name, signal.SIGTERM)
    assert twins.wait_exit(name) == 0
    for stream in streams:
        stream.join()
        stream.check(right)
    assert max(stream.moves for stream in streams) == 1
    twins.start(name)
    twins.wait_ready()
    twins.wait_idle()


@pytest.mark.slow
def test_drained_decode_hands_back_what_it_cannot_finish(twins: Cluster) -> None:
    options: dict[str, Any] = {"max_new_tokens": 1500, "ignore_eos": True}
    with twins.client() as client:
        right = client.complete(PROMPTS[1], timeout_s=60, **options)
    twins.kill("b")
    stream = Stream(twins, PROMPTS[1], **options)
    wait_until(lambda: len(stream.token_ids) >= BEGUN, "tokens")
    twins.signal("a", signal.SIGTERM)
    assert twins.wait_exit("a") == 0
    twins.start("b")
    stream.join()
    stream.check(right)
    assert stream.moves == 1
    assert "handing back 1 sequences" in twins.log("a")
    assert "going on elsewhere: decode instance 'a': the instance stops" in twins.log("router")
    twins.start("a")
    twins.wait_ready()
    twins.wait_idle()


def test_clients_that_leave_and_deadlines_that_pass_in_a_move_leave_nothing(
    twins: Cluster, wanted: Wanted
) -> None:
    streams = begin_all(twins, wanted)
    hurried = Stream(twins, PROMPTS[2], timeout_s=3, max_new_tokens=4000, ignore_eos=True)
    wait_until(lambda: len(hurried.token_ids) >= BEGUN, "tokens")
    for name in ("a", "b"):
        twins.kill(name)
    time.sleep(0.1)
    for kind in ("greedy", "seeded", "penalties"):
        streams.pop(kind)._leave.set()
    hurried.join()
    assert isinstance(hurried.error, DeadlineExceeded)
    for name in ("a", "b"):
        twins.start(name)
    check_all(streams, wanted)
    twins.wait_ready()
    twins.wait_idle()
