"""Two prefill instances: prompts that begin alike go to the one that has their beginning."""

import time
from collections.abc import Iterator

import pytest

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, wait_until
from tests.integration.conftest import BLOCK

FLAGS = ("--dtype", "float32", "--block-size", str(BLOCK), "--kv-memory-mib", "8")
PREFILLS = ("first", "second")
SHARED = 10 * BLOCK


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    logs = tmp_path_factory.mktemp("routing")
    with Cluster(MODEL_DIR, logs, *FLAGS, prefills=PREFILLS) as cluster:
        yield cluster


def prompt(seed: int, own: int = 0) -> list[int]:
    """A beginning by `seed`, and an end that no other prompt has."""
    return [(7 * seed + 3 * i * i) % 300 for i in range(SHARED)] + [own % 300] * 40


def known(cluster: Cluster) -> dict[str, int]:
    """Blocks of prefix caches that the router knows of."""
    with cluster.client() as client:
        instances = client.status().instances
    return {i.name: i.known_prefix_blocks for i in instances if i.role == "prefill"}


def wait_for_news(cluster: Cluster) -> None:
    """Return when the router knows just what the instances have cached, and all are idle."""
    began = time.monotonic()

    def told() -> bool:
        asked = time.monotonic()
        with cluster.client() as client:
            instances = client.status().instances
        return all(
            # What was heard before says nothing of now.
            i.heartbeat_age_s < asked - began
            and i.blocks.free + i.blocks.cached == i.blocks.total
            and i.blocks.cached == i.known_prefix_blocks
            for i in instances
        )

    wait_until(told, "the router knows what is cached")


def ask(cluster: Cluster, tokens: list[int], cache_salt: str = "") -> tuple[str, int]:
    """Which instance computed the prompt, and how much of it the instance had."""
    with cluster.client() as client:
        answer = client.complete(tokens, max_new_tokens=2, ignore_eos=True, cache_salt=cache_salt)
    return answer.stats.prefill_instance, answer.stats.cached_tokens


def test_repeated_beginnings_stay_where_they_are_and_move_when_the_holder_dies(
    pool: Cluster,
) -> None:
    # Other things being equal the first by name is taken: what follows is not chance.
    assert ask(pool, prompt(1)) == ("first", 0)
    wait_for_news(pool)
    assert known(pool) == {"first": SHARED // BLOCK + 1, "second": 0}
    for own in range(1, 5):
        assert ask(pool, prompt(1, own)) == ("first", SHARED)
    pool.kill("first")
    assert ask(pool, prompt(1, 5)) == ("second", 0)
    pool.start("first")
    pool.wait_ready()
    wait_for_news(pool)
    assert known(pool) == {"first": 0, "second": SHARED // BLOCK + 1}
    for own in range(6, 10):
        assert ask(pool, prompt(1, own)) == ("second", SHARED)
    assert ask(pool, prompt(2)) == ("first", 0)
    assert ask(pool, prompt(1), cache_salt="another user")[1] == 0
    pool.wait_idle()


def test_router_that_comes_back_is_told_the_whole_cache(pool: Cluster) -> None:
    name, _ = ask(pool, prompt(3))
    wait_for_news(pool)
    before = known(pool)
    pool.kill("router")
    pool.start("router")
    pool.wait_ready()
    wait_until(lambda: known(pool) == before, "the router knows what it knew")
    assert ask(pool, prompt(3, 1)) == (name, SHARED)
