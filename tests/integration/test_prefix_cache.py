"""Prompts that begin alike: what prefill still has is not computed again, answers are the same."""

from collections.abc import Iterator

import pytest

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster
from tests.integration.conftest import BLOCK, Reference, reference

TOKENS = 8
FLAGS = ("--dtype", "float32", "--block-size", str(BLOCK))


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(MODEL_DIR)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    logs = tmp_path_factory.mktemp("cached")
    with Cluster(MODEL_DIR, logs, *FLAGS, "--kv-memory-mib", "8") as cluster:
        yield cluster


def prompt(seed: int, tokens: int) -> list[int]:
    return [(7 * seed + 3 * i * i) % 300 for i in range(tokens)]


@pytest.mark.parametrize("shared", [0, 1, 31, 32, 33, 64, 299, 300])
def test_answers_are_those_without_a_cache(
    cached: Cluster, expected: Reference, shared: int
) -> None:
    whole = prompt(shared, 300)
    other = whole[:shared] + prompt(1000 + shared, 300)[shared:]
    with cached.client() as client:
        for tokens, known in ((whole, 0), (other, min(shared, 299) // BLOCK * BLOCK)):
            answer = client.complete(tokens, max_new_tokens=TOKENS, ignore_eos=True)
            assert list(answer.token_ids) == expected.tokens(tokens, TOKENS)
            assert answer.stats.cached_tokens == known
            assert answer.stats.kv_bytes > 0
    cached.wait_idle()


def test_more_prompts_than_the_cache_holds(cached: Cluster, expected: Reference) -> None:
    """The memory holds about 2,000 tokens."""
    prompts = [prompt(2000 + seed, 700) for seed in range(8)]
    with cached.client() as client:
        for tokens in prompts + prompts[::-1]:
            answer = client.complete(tokens, max_new_tokens=TOKENS, ignore_eos=True)
            assert list(answer.token_ids) == expected.tokens(tokens, TOKENS)
    cached.wait_idle()


def test_salts_keep_users_apart(cached: Cluster) -> None:
    tokens = prompt(5000, 200)
    with cached.client() as client:
        known = [
            client.complete(tokens, max_new_tokens=2, cache_salt=salt).stats.cached_tokens
            for salt in ("one", "two", "one")
        ]
    assert known == [0, 0, 199 // BLOCK * BLOCK]
