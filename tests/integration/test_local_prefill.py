"""A decode instance computes short and mostly known prompts itself, and answers as prefill does."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from twinpool import Completion

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, wait_until
from tests.integration.conftest import BLOCK, Reference, reference
from tests.integration.test_faults import Attempt
from tests.integration.test_ranks import prompt_of

FLAGS = ("--dtype", "float32", "--block-size", str(BLOCK))
MOST = 100
# Two pieces for most prompts here, three for some.
DECODE = ("--local-prefill-tokens", "40")
ROUTER = ("--local-prefill-max", str(MOST))
LAYOUTS = {
    "tp2": ("--tp", "2"),
    "pp2": ("--pp", "2"),
    "dp2 x ep2": ("--dp", "2", "--ep", "2", "--dispatch", "alltoall"),
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"ignore_eos": True},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 5, "ignore_eos": True},
    "penalties": {
        "temperature": 0.75,
        "seed": 3,
        "repetition_penalty": 1.25,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "ignore_eos": True,
    },
    "logprobs": {"logprobs": 3, "ignore_eos": True},
    "stop": {"min_new_tokens": 1},
    "stop at once": {},
}


def is_local(answer: Completion) -> bool:
    return answer.stats.prefill_instance == ""


def ask(cluster: Cluster, prompt: list[int], new: int = 12, **sampling: Any) -> Completion:
    sampling = sampling or {"ignore_eos": True}
    with cluster.client() as client:
        return client.complete(prompt, max_new_tokens=new, timeout_s=30, **sampling)


@pytest.fixture(scope="module")
def local(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A system whose decode instance is all there is: prefill joins when a test wants it."""
    logs = tmp_path_factory.mktemp("local")
    more = {"decode": DECODE}
    with Cluster(model, logs, *FLAGS, router_flags=ROUTER, prefills=(), more_flags=more) as cluster:
        yield cluster


@pytest.mark.parametrize("name", SAMPLINGS)
def test_answers_are_those_that_prefill_begins(local: Cluster, cluster: Cluster, name: str) -> None:
    sampling = SAMPLINGS[name]
    for length in (1, 16, 40, 41, 99):
        prompt = prompt_of(length, seed=length)
        if name.startswith("stop"):
            tokens = ask(cluster, prompt).token_ids
            stop = tokens[0 if name == "stop at once" else 2]
            sampling = {**SAMPLINGS[name], "stop_token_ids": [stop]}
        here, there = ask(local, prompt, **sampling), ask(cluster, prompt, **sampling)
        assert is_local(here)
        assert not is_local(there)
        assert (here.token_ids, here.finish_reason) == (there.token_ids, there.finish_reason)
        assert here.text == there.text
        assert len(here.logprobs) == len(there.logprobs)
        for ours, theirs in zip(here.logprobs, there.logprobs, strict=True):
            assert ours.chosen.logprob == pytest.approx(theirs.chosen.logprob, abs=1e-4)
            assert [top.token_id for top in ours.top] == [top.token_id for top in theirs.top]
    local.wait_idle()


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(MODEL_DIR)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A system that has the choice, whose decode instances can be killed and drained."""
    logs = tmp_path_factory.mktemp("both")
    more = dict.fromkeys(("a", "b"), DECODE)
    decodes = tuple(more)
    flags = (*FLAGS, "--kv-memory-mib", "32")
    with Cluster(
        MODEL_DIR, logs, *flags, router_flags=ROUTER, decodes=decodes, more_flags=more
    ) as cluster:
        yield cluster


def known(cluster: Cluster, name: str) -> int:
    """Blocks of a decode instance that the router knows of."""
    with cluster.client() as client:
        found = {i.name: i.known_prefix_blocks for i in client.status().instances}
    return found[name]


def test_either_way_is_tried(both: Cluster) -> None:
    ways = set()
    with both.client() as client:

        def have_been() -> bool:
            ways.add(is_local(client.complete(prompt_of(16, 1), max_new_tokens=2)))
            return len(ways) == 2

        wait_until(have_been, "short prompts at prefill and at decode")


def test_next_turn_is_computed_where_the_last_one_was_also_without_any_prefill(
    both: Cluster, expected: Reference
) -> None:
    turn = prompt_of(400, seed=1)
    first = ask(both, turn, 20)
    assert first.stats.prefill_instance == "prefill"  # too long
    both.kill("prefill")
    for seed in (2, 3):
        turn = turn + list(first.token_ids) + prompt_of(30, seed)
        held = (len(turn) - 31) // BLOCK  # the answer's last token has no KV
        where = first.stats.decode_instance
        wait_until(
            lambda where=where, held=held: known(both, where) >= held,  # type: ignore[misc]
            "the router knows of the turn before",
        )
        first = ask(both, turn, 20)
        assert list(first.token_ids) == expected.tokens(turn, 20)
        assert is_local(first)
        assert first.stats.decode_instance == where
        assert first.stats.cached_tokens == first.stats.decode_cached_tokens == held * BLOCK
        assert first.stats.kv_bytes == 0
    prompt = prompt_of(70, seed=6)
    answer = ask(both, prompt)
    assert list(answer.token_ids) == expected.tokens(prompt, 12)
    assert is_local(answer)
    both.start("prefill")
    both.wait_ready()
    both.wait_idle()


def test_long_and_short_prompts_side_by_side_equal_a_single_run(
    both: Cluster, expected: Reference
) -> None:
    lengths = range(5, 340, 14)
    wanted = [(prompt_of(length, 40 + length), 3 * (1 + length % 9)) for length in lengths]
    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = list(pool.map(lambda want: ask(both, *want), wanted))
    for (prompt, new), answer in zip(wanted, answers, strict=True):
        assert list(answer.token_ids) == expected.tokens(prompt, new)
        assert not (is_local(answer) and len(prompt) > MOST)
    both.wait_idle()


def test_one_token_is_always_prefills(both: Cluster, expected: Reference) -> None:
    prompt = prompt_of(10, seed=9)
    answer = ask(both, prompt, 1)
    assert list(answer.token_ids) == expected.tokens(prompt, 1)
    assert answer.stats.prefill_instance == "prefill"


def test_clients_that_leave_in_mid_prompt_give_everything_back(
    both: Cluster, expected: Reference
) -> None:
    for seed in range(12):
        with both.client() as client:
            stream = client.generate(prompt_of(99, seed), max_new_tokens=300, ignore_eos=True)
            for _ in range(seed % 3):
                next(stream)
            stream.close()
    both.wait_idle()
    prompt = prompt_of(60, seed=5)
    assert list(ask(both, prompt).token_ids) == expected.tokens(prompt, 12)


@pytest.mark.parametrize("how", ["killed", "drained"])
def test_answers_of_an_instance_that_goes_go_on_elsewhere(
    both: Cluster, expected: Reference, how: str
) -> None:
    """Some of them in mid prompt: more come than a step has room for."""
    attempts = [Attempt(both, prompt_of(90, 50 + seed), 40) for seed in range(16)]
    wait_until(lambda: any(each.tokens for each in attempts), "the first tokens")
    both.signal("a", signal.SIGKILL if how == "killed" else signal.SIGTERM)
    for attempt in attempts:
        attempt.join()
        assert attempt.error is None
        attempt.check(expected)
    both.wait_exit("a")
    both.start("a")
    both.wait_ready()
    both.wait_idle()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_compute_prompts_together(name: str, tmp_path: Path, expected: Reference) -> None:
    flags = {"decode": (*DECODE, *LAYOUTS[name])}
    with Cluster(
        MODEL_DIR, tmp_path, *FLAGS, router_flags=ROUTER, prefills=(), more_flags=flags
    ) as cluster:
        wanted = [(prompt_of(length, length), 8 + length % 30) for length in range(1, 100, 6)]
        with ThreadPoolExecutor(len(wanted)) as pool:
            answers = list(pool.map(lambda want: ask(cluster, *want), wanted))
        assert all(map(is_local, answers))
        for (prompt, new), answer in zip(wanted, answers, strict=True):
            assert list(answer.token_ids) == expected.tokens(prompt, new)
        seeded = SAMPLINGS["penalties"]
        prompt = prompt_of(80, seed=4)
        found = list(ask(cluster, prompt, 16, **seeded).token_ids)
        asked = {key: value for key, value in seeded.items() if key != "ignore_eos"}
        assert found == expected.tokens(prompt, 16, **asked)
        cluster.wait_idle()


@pytest.mark.slow
def test_deterministic_answers_are_the_same_to_the_bit_however_they_begin(tmp_path: Path) -> None:
    """Beside others, and whether prefill or decode has computed the prompt."""
    prompts = [prompt_of(length, length) for length in (3, 41, 99)]
    sampling = {"ignore_eos": True, "logprobs": 2}
    found = []
    flags, more = (*FLAGS, "--deterministic"), {"decode": DECODE}
    for prefills, router_flags in (((), ROUTER), (("prefill",), ())):
        with (
            Cluster(
                MODEL_DIR,
                tmp_path,
                *flags,
                router_flags=router_flags,
                prefills=prefills,
                more_flags=more,
            ) as cluster,
            ThreadPoolExecutor(3) as pool,
        ):
            answers = list(pool.map(lambda p, c=cluster: ask(c, p, **sampling), prompts))
        assert [is_local(answer) for answer in answers] == [not prefills] * 3
        found.append([(a.token_ids, a.logprobs) for a in answers])
    assert found[0] == found[1]
