"""Conversations: what decode has of a prompt is not sent again, and the router knows who has it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from twinpool import Completion

from engine.config import load_config
from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, wait_until
from tests.integration.conftest import BLOCK, Reference, reference

TOKENS = 8
FLAGS = ("--dtype", "float32", "--block-size", str(BLOCK), "--kv-memory-mib", "8")
DECODES = ("first", "second")
CONFIG = load_config(MODEL_DIR)
# Keys and values in float32; what lies behind the last token of the last block is sent as well.
BLOCK_BYTES = 2 * 4 * BLOCK * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_size


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(MODEL_DIR)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    logs = tmp_path_factory.mktemp("reuse")
    with Cluster(MODEL_DIR, logs, *FLAGS, decodes=DECODES) as cluster:
        yield cluster


def prompt(seed: int, tokens: int) -> list[int]:
    return [(11 * seed + 5 * i * i) % 300 for i in range(tokens)]


def ask(cluster: Cluster, tokens: list[int], *, new: int = TOKENS, salt: str = "") -> Completion:
    with cluster.client() as client:
        return client.complete(tokens, max_new_tokens=new, ignore_eos=True, cache_salt=salt)


def known(cluster: Cluster) -> dict[str, int]:
    """Blocks at decode that the router knows of."""
    with cluster.client() as client:
        instances = client.status().instances
    return {i.name: i.known_prefix_blocks for i in instances if i.role == "decode"}


def wait_for_news(cluster: Cluster, name: str, blocks: int) -> None:
    wait_until(lambda: known(cluster)[name] >= blocks, f"the router knows {blocks} of {name}")


def test_conversation_sends_only_what_is_new_and_stays_where_it_is(
    pool: Cluster, expected: Reference
) -> None:
    turn, on_board, where = prompt(1, 300), 0, None
    for question in ([], prompt(2, 50), prompt(3, 90)):
        turn = turn + question
        answer = ask(pool, turn, new=40)
        assert list(answer.token_ids) == expected.tokens(turn, 40)
        assert answer.stats.decode_instance == (where or answer.stats.decode_instance)
        assert answer.stats.decode_cached_tokens == on_board // BLOCK * BLOCK
        assert answer.stats.kv_bytes == (-(-len(turn) // BLOCK) - on_board // BLOCK) * BLOCK_BYTES
        turn = turn + list(answer.token_ids)
        # The last token of an answer has no KV: nothing came after it.
        where, on_board = answer.stats.decode_instance, len(turn) - 1
        wait_for_news(pool, where, on_board // BLOCK)
    pool.wait_idle()


def test_nothing_is_sent_of_a_prompt_of_whole_blocks_that_decode_has(
    pool: Cluster, expected: Reference
) -> None:
    tokens = prompt(10, 4 * BLOCK)
    first = ask(pool, tokens)
    wait_for_news(pool, first.stats.decode_instance, 4)
    again = ask(pool, tokens)
    assert again.token_ids == first.token_ids == tuple(expected.tokens(tokens, TOKENS))
    assert again.stats.decode_instance == first.stats.decode_instance
    assert (again.stats.kv_bytes, again.stats.decode_cached_tokens) == (0, len(tokens))
    pool.wait_idle()


def test_salts_keep_users_apart_at_decode(pool: Cluster) -> None:
    tokens = prompt(20, 200)
    answers = []
    for salt in ("one", "two", "", "one"):
        answers.append(ask(pool, tokens, salt=salt))
        pool.wait_idle()
        wait_for_news(pool, answers[-1].stats.decode_instance, 6)
    assert [a.stats.decode_cached_tokens for a in answers] == [0, 0, 0, 6 * BLOCK]
    assert len({a.token_ids for a in answers}) == 1


def test_decode_instance_that_restarts_is_known_to_have_nothing(
    pool: Cluster, expected: Reference
) -> None:
    tokens = prompt(30, 200)
    name = ask(pool, tokens).stats.decode_instance
    wait_for_news(pool, name, 6)
    pool.kill(name)
    pool.start(name)
    pool.wait_ready()
    wait_until(lambda: known(pool).get(name) == 0, "the router has forgotten what was there")
    answer = ask(pool, tokens)
    assert list(answer.token_ids) == expected.tokens(tokens, TOKENS)
    assert answer.stats.decode_cached_tokens == 0
    pool.wait_idle()


def test_more_conversations_than_decode_has_room_for(pool: Cluster, expected: Reference) -> None:
    """The memory of each instance holds about 2,000 tokens."""
    prompts = [prompt(40 + seed, 700) for seed in range(7)]
    for tokens in prompts + prompts[::-1]:
        assert list(ask(pool, tokens).token_ids) == expected.tokens(tokens, TOKENS)
    pool.wait_idle()


def test_conversations_side_by_side_equal_a_single_run(pool: Cluster, expected: Reference) -> None:
    """They begin alike, and are together more than there is room for."""
    shared = prompt(60, 4 * BLOCK)

    def converse(seed: int, answer: Callable[[list[int], int], Sequence[int]]) -> list[list[int]]:
        turn, answers = shared + prompt(61 + seed % 3, 40 + seed), []
        for question in range(3):
            answers.append(list(answer(turn, 20 + seed)))
            turn = turn + answers[-1] + prompt(70 + seed + question, 45)
        return answers

    with ThreadPoolExecutor(12) as clients:
        found = list(
            clients.map(
                lambda seed: converse(seed, lambda t, n: ask(pool, t, new=n).token_ids), range(12)
            )
        )
    assert found == [converse(seed, expected.tokens) for seed in range(12)]
    pool.wait_idle()


def test_reuse_can_be_turned_off(tmp_path_factory: pytest.TempPathFactory) -> None:
    logs = tmp_path_factory.mktemp("off")
    off = {"decode": ("--no-prefix-cache",)}
    with Cluster(MODEL_DIR, logs, *FLAGS, more_flags=off) as cluster:
        tokens = prompt(1, 300)
        answers = [ask(cluster, tokens) for _ in range(2)]
        for answer in answers:
            assert answer.stats.kv_bytes == -(-len(tokens) // BLOCK) * BLOCK_BYTES
            assert answer.stats.decode_cached_tokens == 0
        assert answers[1].stats.cached_tokens == 299 // BLOCK * BLOCK
        assert known(cluster) == {"decode": 0}
        cluster.wait_idle()
