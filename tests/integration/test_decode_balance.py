"""Experts change places while a decode instance serves: no token changes, and no rank is waited for
that is gone.
"""

import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, free_port, some_slow, wait_until
from tests.integration.conftest import BLOCK, Reference, reference
from tests.integration.test_ranks import answer, other_ranks, prompt_of

LAYOUTS = {
    "dp2 x ep2": ("--dp", "2", "--ep", "2", "--redundant-experts", "1"),
    "tp2 x ep2": ("--tp", "2", "--ep", "2"),
    "pp2 x dp2 x ep2": ("--pp", "2", "--dp", "2", "--ep", "2"),
}
FLAGS = ("--dtype", "float32", "--block-size", str(BLOCK))
METRICS = free_port()


@pytest.fixture(scope="module")
def expected() -> Reference:
    return reference(MODEL_DIR)


@pytest.fixture(scope="module", params=some_slow(LAYOUTS, "dp2 x ep2"))
def balanced(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A system whose decode instance looks at its experts' loads several times a second."""
    more = ("--balance-interval-s", "0.3", "--metrics-port", str(METRICS))
    flags = {"decode": (*LAYOUTS[request.param], "--dispatch", "alltoall", *more)}
    with Cluster(MODEL_DIR, tmp_path_factory.mktemp("split"), *FLAGS, more_flags=flags) as cluster:
        yield cluster


def metrics() -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics", timeout=5) as answered:
        text = answered.read().decode()
    return {name: float(value) for name, value in re.findall(r"^([a-z]\S*) (\S+)$", text, re.M)}


def switches() -> float:
    return metrics()["twinpool_decode_rebalance_switches_total"]


def skewed(number: int) -> list[int]:
    """Return a prompt of one token again and again, which has the same experts each time."""
    return [17 + number % 2] * (20 + number)


def test_tokens_equal_a_single_ranks_while_experts_move(
    balanced: Cluster, expected: Reference
) -> None:
    prompts = [skewed(0), skewed(1), skewed(2), prompt_of(30, seed=1)]
    wanted = {tuple(prompt): expected.tokens(prompt, 150) for prompt in prompts}
    before = switches()

    def ask(prompt: tuple[int, ...]) -> list[int]:
        return answer(balanced, list(prompt), 150)

    rounds = 0
    with ThreadPoolExecutor(len(wanted)) as pool:
        while switches() < before + 4:
            found = dict(zip(wanted, pool.map(ask, wanted), strict=True))
            assert found == wanted
            rounds += 1
            assert rounds < 20, "experts do not move"
    balanced.wait_idle()


def test_metrics_say_where_steps_spend_their_time(balanced: Cluster) -> None:
    answer(balanced, prompt_of(30, seed=1), 60)
    parts = ("attention", "experts", "collectives")
    wanted = [
        name
        for rank in range(len(other_ranks(balanced, "decode")) + 1)
        for name in (
            *(f'step_part_seconds_total{{part="{part}",rank="{rank}"}}' for part in parts),
            f'collective_calls_total{{kind="all_to_all",rank="{rank}"}}',
        )
    ]

    def all_are_told() -> bool:
        found = metrics()
        return all(found.get(f"twinpool_decode_{name}", 0) > 0 for name in wanted)

    wait_until(all_are_told, "all ranks have told their times and collectives")
    assert metrics()["twinpool_decode_inter_token_seconds_count"] >= 58


@pytest.mark.slow
def test_a_rank_that_is_lost_in_a_round_takes_its_instance_down(
    balanced: Cluster, expected: Reference
) -> None:
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(answer, balanced, skewed(number), 300) for number in range(2)]
        before = switches()
        wait_until(lambda: switches() > before, "experts move")
        others = other_ranks(balanced, "decode")
        os.kill(others[-1], signal.SIGKILL)
        assert balanced.wait_exit("decode") == 70
        wait_until(lambda: not any(Path(f"/proc/{p}").exists() for p in others), "no rank is left")
        balanced.start("decode")
        balanced.wait_ready()
        for number, each in enumerate(asked):
            assert each.result() == expected.tokens(skewed(number), 300)
