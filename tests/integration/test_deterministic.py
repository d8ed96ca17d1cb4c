"""With --deterministic a prompt's tokens in bf16 are the same whoever else is being served."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster
from tests.integration.conftest import BLOCK
from tests.integration.test_parity import GREEDY, SEEDED, make_prompt, served

TOKENS = 12
ROUNDS = 20
COMPANY = 15


@pytest.fixture(scope="module")
def deterministic(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # Few tokens in a step, so that prompts are cut wherever company leaves room.
    flags = ("--dtype", "bfloat16", "--block-size", str(BLOCK), "--deterministic")
    more = {"prefill": ("--max-batched-tokens", "256")}
    logs = tmp_path_factory.mktemp("logs")
    with Cluster(model, logs, *flags, more_flags=more) as cluster:
        yield cluster


def test_a_prompt_answers_the_same_alone_and_in_any_company(deterministic: Cluster) -> None:
    rng = random.Random(29)
    cases = [(make_prompt(rng, length), way) for length in (97, 600) for way in (GREEDY, SEEDED)]
    alone = [served(deterministic, prompt, TOKENS, way) for prompt, way in cases]
    with ThreadPoolExecutor(COMPANY + 1) as pool:
        for number in range(ROUNDS):
            place = number % len(cases)
            company = [
                (
                    make_prompt(rng, rng.choice([1, 5, 33, 64, 200, 450])),
                    rng.choice((GREEDY, SEEDED)),
                )
                for _ in range(COMPANY)
            ]
            at = rng.randrange(COMPANY + 1)
            asked = [*company[:at], cases[place], *company[at:]]
            answers = list(
                pool.map(lambda case: served(deterministic, case[0], TOKENS, case[1]), asked)
            )
            assert answers[at] == alone[place], number
