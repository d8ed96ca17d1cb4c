"""Instances that compute with another memory than transfers use miss nothing.

On a GPU where there is one, held against the same engine on the CPU; else on the CPU with copies
that are late.
"""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, some_slow, wait_until
from tests.integration.conftest import BLOCK, Reference, reference
from tests.integration.test_moves import Stream
from tests.integration.test_ranks import prompt_of

TOKENS = 12
FLAGS: tuple[str, ...] = ("--dtype", "float32", "--block-size", str(BLOCK), "--kv-memory-mib", "16")
LAUNCHER = "tests.integration.apart"
if torch.cuda.is_available():
    FLAGS = (*FLAGS, "--device", "cuda", "--gpu-memory-fraction", "0.3")
    LAUNCHER = ""
# With a copy in the host's memory, and from GPU to GPU or by buffers of the host's.
WAYS: dict[str, tuple[str, ...]] = {
    "mapped": ("--kv-lane", "mapped"),
    "stream": ("--kv-lane", "stream"),
    "gpu": ("--no-kv-host-copy", "--kv-lane", "mapped"),
    "gpu by stream": ("--no-kv-host-copy", "--kv-lane", "stream"),
}
CARRIERS = {"mapped": "mapped", "stream": "tcp", "gpu": "gpu", "gpu by stream": "tcp"}


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(MODEL_DIR)


@pytest.fixture(scope="module", params=some_slow(WAYS, "mapped", "gpu"))
def apart(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Prefill in steps of few tokens, so that prompts are computed in pieces."""
    flags = (*FLAGS, *WAYS[request.param])
    pieces = ("--max-batched-tokens", "128")
    with Cluster(
        MODEL_DIR,
        tmp_path_factory.mktemp("apart"),
        *flags,
        more_flags={"prefill": pieces},
        launcher=LAUNCHER,
    ) as cluster:
        yield cluster
        assert f"KV to decode rank 0: {CARRIERS[request.param]}," in cluster.log("prefill")


def check(cluster: Cluster, expected: Reference, tokens: list[int], new: int = TOKENS) -> list[int]:
    """Ask, and return the answer, which is the right one."""
    with cluster.client() as client:
        answer = client.complete(tokens, max_new_tokens=new, ignore_eos=True, timeout_s=30)
    assert list(answer.token_ids) == expected.tokens(tokens, new)
    return list(answer.token_ids)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 300])
def test_answers_are_right(apart: Cluster, expected: Reference, length: int) -> None:
    check(apart, expected, prompt_of(length, seed=length))


def test_prefixes_that_either_pool_knows_are_used(apart: Cluster, expected: Reference) -> None:
    """Also those that were computed for a request that needed no transfer, and answers' tokens."""
    turn = prompt_of(200, seed=7)
    check(apart, expected, turn, new=1)
    for question in (3, 40, 90):
        turn = turn + check(apart, expected, turn) + prompt_of(question, seed=question)
    check(apart, expected, turn)
    apart.wait_idle()


def test_requests_at_once_keep_apart(apart: Cluster, expected: Reference) -> None:
    prompts = [prompt_of(20 + 37 * n, seed=50 + n) for n in range(8)]

    def ask(prompt: list[int]) -> list[int]:
        with apart.client() as client:
            answer = client.complete(prompt, max_new_tokens=40, ignore_eos=True, timeout_s=30)
        return list(answer.token_ids)

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [expected.tokens(prompt, 40) for prompt in prompts]
    apart.wait_idle()


def test_blocks_of_requests_that_were_given_up_serve_others(
    apart: Cluster, expected: Reference
) -> None:
    """What is still on its way for the old owner comes before what the new one has."""
    streams = [
        Stream(apart, "x" * 400, max_new_tokens=200, ignore_eos=True, cache_salt=str(n))
        for n in range(6)
    ]
    wait_until(lambda: any(stream.token_ids for stream in streams), "a token")
    for stream in streams:
        if stream.token_ids:
            stream.cancel()
    for n in range(4):
        check(apart, expected, prompt_of(250, seed=90 + n))
    for stream in streams:
        stream.join()
    apart.wait_idle()


@pytest.mark.parametrize("copied", [True, False])
def test_decoded_tokens_move_to_another_instance(
    expected: Reference, tmp_path_factory: pytest.TempPathFactory, copied: bool
) -> None:
    way = "--kv-host-copy" if copied else "--no-kv-host-copy"
    with Cluster(
        MODEL_DIR,
        tmp_path_factory.mktemp("moves"),
        *(*FLAGS, "--drain-timeout-s", "3", way),
        decodes=("a", "b"),
        more_flags=dict.fromkeys(("a", "b"), ("--local-prefill-tokens", "40")),
        router_flags=("--local-prefill-max", "100"),
        launcher=LAUNCHER,
    ) as cluster:
        options: dict[str, Any] = {"max_new_tokens": 300, "ignore_eos": True}
        with cluster.client() as client:
            right = client.complete("Once upon a time", timeout_s=60, **options)
        streams = [Stream(cluster, "Once upon a time", **options) for _ in range(4)]
        wait_until(lambda: all(len(stream.token_ids) > 30 for stream in streams), "tokens of all")
        cluster.signal(cluster.busiest("a", "b"), signal.SIGTERM)
        for stream in streams:
            stream.join()
            stream.check(right)
        assert any(stream.moves for stream in streams)
        for length in (30, 90, 95):  # computed at decode, the last ones with a known prefix
            check(cluster, expected, prompt_of(90, seed=1)[:length] + prompt_of(length, seed=2))
