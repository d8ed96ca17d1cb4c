"""Colocated instances answer as split pools do, whatever else is in their steps."""

import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from twinpool import Completion

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, wait_until
from tests.integration.conftest import BLOCK, Reference
from tests.integration.test_faults import Attempt
from tests.integration.test_ranks import prompt_of

CHUNK = 40
FLAGS = ("--dtype", "float32", "--block-size", str(BLOCK))
COLOCATED = (*FLAGS, "--colocated", "--chunk-tokens", str(CHUNK), "--max-batch", "12")
DRAIN_S = 2
LAYOUTS = {
    "tp2": ("--tp", "2"),
    "pp2": ("--pp", "2"),
    "dp2 x ep2": ("--dp", "2", "--ep", "2", "--dispatch", "alltoall"),
}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 5}


@pytest.fixture(scope="module")
def twins(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A router with two colocated instances and nothing else."""
    logs = tmp_path_factory.mktemp("colocated")
    flags = (*COLOCATED, "--drain-timeout-s", str(DRAIN_S))
    with Cluster(model, logs, *flags, prefills=(), decodes=("a", "b")) as cluster:
        yield cluster


def ask(cluster: Cluster, prompt: list[int], new: int = 12, **options: Any) -> Completion:
    options.setdefault("ignore_eos", True)
    with cluster.client() as client:
        return client.complete(prompt, max_new_tokens=new, timeout_s=60, **options)


def ask_all(cluster: Cluster, wanted: list[tuple[list[int], int]]) -> list[Completion]:
    with ThreadPoolExecutor(len(wanted)) as pool:
        return list(pool.map(lambda want: ask(cluster, *want), wanted))


def test_prompts_in_chunks_beside_others_tokens_equal_a_single_run(
    twins: Cluster, single: Reference
) -> None:
    """More of them than the two batches hold, from one token to many chunks."""
    lengths = (*range(1, 120, 9), 39, 40, 41, 64, 80, 200, 333, 700)
    wanted = [(prompt_of(length, length), 1 + 3 * (length % 8)) for length in lengths]
    random.Random(3).shuffle(wanted)
    answers = ask_all(twins, wanted)
    for (prompt, new), answer in zip(wanted, answers, strict=True):
        assert list(answer.token_ids) == single.tokens(prompt, new)
        assert (answer.stats.prefill_instance, answer.stats.kv_bytes) == ("", 0)
    assert {answer.stats.decode_instance for answer in answers} == {"a", "b"}
    twins.wait_idle()


def test_answers_are_those_of_split_pools(twins: Cluster, cluster: Cluster) -> None:
    for length in (1, 40, 95):
        prompt = prompt_of(length, 7 * length)
        tokens = ask(cluster, prompt).token_ids
        options: list[dict[str, Any]] = [
            {"logprobs": 2},
            SEEDED,
            {"stop_token_ids": [tokens[2]]},
            {"stop_token_ids": [tokens[0]]},
            {"stop": [ask(cluster, prompt).text[1:3]]} if length > 1 else {},
        ]
        for each in options:
            ours, theirs = (ask(system, prompt, **each) for system in (twins, cluster))
            assert (ours.token_ids, ours.text) == (theirs.token_ids, theirs.text)
            assert ours.finish_reason == theirs.finish_reason
            for own, other in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert own.chosen.logprob == pytest.approx(other.chosen.logprob, abs=1e-4)
    twins.wait_idle()


def test_prompts_that_wait_share_what_is_computed_before_them(
    twins: Cluster, single: Reference
) -> None:
    shared = prompt_of(10 * BLOCK, 99)
    wanted = [(shared + prompt_of(5 + 3 * i, i), 6) for i in range(16)]
    answers = ask_all(twins, wanted)
    for (prompt, new), answer in zip(wanted, answers, strict=True):
        assert list(answer.token_ids) == single.tokens(prompt, new)
    # All came before any of it was known.
    assert sum(answer.stats.cached_tokens == len(shared) for answer in answers) >= 8
    twins.wait_idle()


def test_clients_that_leave_in_mid_prompt_give_everything_back(
    twins: Cluster, single: Reference
) -> None:
    other = Attempt(twins, prompt_of(60, 1), 40)
    for seed in range(12):
        with twins.client() as client:
            stream = client.generate(prompt_of(600, seed), max_new_tokens=300, ignore_eos=True)
            for _ in range(seed % 2):
                next(stream)
            stream.close()
    other.join()
    other.check(single)
    assert other.error is None
    twins.wait_idle()


@pytest.mark.slow
def test_answers_of_a_drained_replica_go_on_at_the_other(twins: Cluster, single: Reference) -> None:
    attempts = under_way(twins, 8, tokens=500)  # more than may still be generated there
    twins.signal("a", signal.SIGTERM)
    check(attempts, single)
    twins.wait_exit("a")
    twins.start("a")
    twins.wait_ready()
    twins.wait_idle()


@pytest.mark.slow
def test_answers_wait_for_replicas_that_start_again(twins: Cluster, single: Reference) -> None:
    attempts = under_way(twins, 24)
    wait_until(lambda: all(each.tokens for each in attempts), "the first tokens")
    for name in ("a", "b"):
        twins.kill(name)
    for name in ("a", "b"):
        twins.start(name)
    check(attempts, single)
    twins.wait_idle()


def under_way(twins: Cluster, count: int = 16, tokens: int = 60) -> list[Attempt]:
    """Requests of which some are in mid prompt, some run, and some wait for their turn."""
    attempts = [Attempt(twins, prompt_of(30 + 20 * i, 500 + i), tokens) for i in range(count)]
    wait_until(lambda: sum(bool(each.tokens) for each in attempts) > 3, "the first tokens")
    return attempts


def check(attempts: list[Attempt], single: Reference) -> None:
    for attempt in attempts:
        attempt.join()
        assert attempt.error is None
        attempt.check(single)
    assert any(each.stats is not None and each.stats.moves for each in attempts)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_compute_chunks_together(
    name: str, model: Path, tmp_path: Path, single: Reference
) -> None:
    if "ep" in name and model != MODEL_DIR:
        pytest.skip("a dense model has no experts")
    flags = (*COLOCATED, *LAYOUTS[name])
    with Cluster(model, tmp_path, *flags, prefills=()) as cluster:
        shared = prompt_of(3 * BLOCK, 1)
        wanted = [(prompt_of(length, length), 8 + length % 30) for length in range(1, 300, 21)]
        wanted += [(shared + prompt_of(9 + i, i), 10) for i in range(6)]
        for (prompt, new), answer in zip(wanted, ask_all(cluster, wanted), strict=True):
            assert list(answer.token_ids) == single.tokens(prompt, new)
        cluster.wait_idle()


def test_answers_of_a_killed_replica_go_on_at_the_other(twins: Cluster, single: Reference) -> None:
    """The last test here: the replica stays away."""
    attempts = under_way(twins)
    twins.kill("a")
    check(attempts, single)
    twins.wait_idle()
