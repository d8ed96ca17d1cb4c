"""A decode instance of several ranks gives the tokens of one rank, and lives and dies as one."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from launch.builtin import MODEL_DIR
from tests.integration.cluster import ROOT, Cluster, free_port, some_slow, wait_until
from tests.integration.conftest import BLOCK, Reference, reference
from tests.integration.test_faults import Attempt
from tests.integration.test_ranks import answer, names, other_ranks, prompt_of, torchrun

# What others there are, tests/integration/layouts has.
LAYOUTS = {
    "tp2": ("--tp", "2"),
    "pp2 x tp2": ("--pp", "2", "--tp", "2"),
    "dp2 x tp2 x ep4": ("--dp", "2", "--tp", "2", "--ep", "4", "--dispatch", "padded"),
}
FLAGS = ("--dtype", "float32", "--block-size", str(BLOCK))


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(MODEL_DIR)


@pytest.fixture(scope="module", params=some_slow(LAYOUTS, "tp2"))
def split(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A system whose decode instance has several ranks."""
    flags = {"decode": LAYOUTS[request.param]}
    with Cluster(MODEL_DIR, tmp_path_factory.mktemp("split"), *FLAGS, more_flags=flags) as cluster:
        yield cluster


def test_tokens_equal_a_single_ranks(split: Cluster, expected: Reference) -> None:
    for length in (1, 31, 64, 65, 700):
        prompt = prompt_of(length, seed=length)
        assert answer(split, prompt, 24) == expected.tokens(prompt, 24)


def test_requests_side_by_side_equal_a_single_ranks(split: Cluster, expected: Reference) -> None:
    rng = random.Random(7)
    wanted = [(prompt_of(rng.choice((3, 40, 333)), s), rng.randrange(2, 40)) for s in range(16)]
    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = list(pool.map(lambda want: answer(split, want[0], want[1], 0.9), wanted))
    assert answers == [
        expected.tokens(prompt, tokens, temperature=0.9, seed=11) for prompt, tokens in wanted
    ]
    split.wait_idle()


def test_penalties_and_logprobs_are_a_single_ranks(split: Cluster, expected: Reference) -> None:
    prompt = prompt_of(50, seed=5)
    sampling: dict[str, Any] = {
        "temperature": 0.75,
        "seed": 3,
        "repetition_penalty": 1.25,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
    }
    with split.client() as client:
        done = client.complete(prompt, max_new_tokens=20, ignore_eos=True, logprobs=3, **sampling)
    assert list(done.token_ids) == expected.tokens(prompt, 20, **sampling)
    assert [len(position.top) for position in done.logprobs] == [3] * 20


def test_requests_that_clients_leave_give_everything_back(
    split: Cluster, expected: Reference
) -> None:
    rng = random.Random(3)
    for number in range(12):
        with split.client() as client:
            stream = client.generate(
                prompt_of(rng.choice((40, 900)), number), max_new_tokens=500, ignore_eos=True
            )
            for _ in range(rng.randrange(9)):
                next(stream)
            stream.close()
    split.wait_idle()
    prompt = prompt_of(100, seed=3)
    assert answer(split, prompt, 4) == expected.tokens(prompt, 4)


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_lost_rank_takes_its_instance_down(
    split: Cluster, expected: Reference, how: signal.Signals
) -> None:
    others = other_ranks(split, "decode")
    os.kill(others[-1], how)
    assert split.wait_exit("decode") == 70
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in others), "no rank is left")
    split.start("decode")
    split.wait_ready()
    prompt = prompt_of(100, seed=4)
    assert answer(split, prompt, 4) == expected.tokens(prompt, 4)


def test_layout_that_cannot_be_is_refused_with_those_that_can(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "decode", str(MODEL_DIR), "--tp", "3"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "tp=3 does not divide" in refused.stderr
    assert "use tp=1, 2" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_ranks_that_torchrun_starts_on_two_nodes_are_one_instance(
    tmp_path: Path, expected: Reference
) -> None:
    with Cluster(MODEL_DIR, tmp_path, *FLAGS, decodes=()) as cluster, ExitStack() as nodes:
        port = str(free_port())
        first, second = (
            nodes.enter_context(torchrun(node, port, cluster.address, tmp_path, "decode", "tp2"))
            for node in range(2)
        )
        wait_until(lambda: names(cluster) == {"prefill", "wide"}, "the instance is there", 60)
        prompt = prompt_of(700, seed=1)
        assert answer(cluster, prompt, 20) == expected.tokens(prompt, 20)
        first.terminate()
        assert second.wait(30) == 0, (tmp_path / "node-1.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_answers_of_a_lost_rank_go_on_elsewhere(
    tmp_path: Path, expected: Reference, how: signal.Signals
) -> None:
    flags = {"a": ("--dp", "2", "--ep", "2"), "b": ()}
    with Cluster(MODEL_DIR, tmp_path, *FLAGS, decodes=("a", "b"), more_flags=flags) as cluster:
        attempts = [Attempt(cluster, prompt_of(40, seed), 300) for seed in range(6)]
        wait_until(lambda: all(len(each.tokens) > 20 for each in attempts), "tokens of all")
        os.kill(other_ranks(cluster, "a")[0], how)
        for attempt in attempts:
            attempt.join()
            assert attempt.error is None
            attempt.check(expected)
        moves = [attempt.stats.moves for attempt in attempts if attempt.stats is not None]
        assert sorted(set(moves)) == [0, 1]
        assert cluster.wait_exit("a") == 70
        cluster.start("a")
        cluster.wait_ready()
        cluster.wait_idle()
