"""The disaggregated system answers as the same engine in one process does, token by token."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.cluster import Cluster
from tests.integration.conftest import BLOCK, Reference

GREEDY: dict[str, object] = {}
SEEDED: dict[str, object] = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 20}
PENALISED: dict[str, object] = {
    "temperature": 0.7,
    "seed": 3,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
}


def make_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(300) for _ in range(length)]


def served(
    cluster: Cluster, prompt: list[int], tokens: int, sampling: dict[str, object]
) -> list[int]:
    with cluster.client() as client:
        answer = client.complete(
            prompt,
            max_new_tokens=tokens,
            ignore_eos=True,
            timeout_s=60,
            **sampling,  # type: ignore[arg-type]
        )
    return list(answer.token_ids)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 1000, 4096])
def test_tokens_equal_a_single_process_run(
    cluster: Cluster, single: Reference, length: int, sampling: dict[str, object]
) -> None:
    prompt = make_prompt(random.Random(length), length)
    assert served(cluster, prompt, 12, sampling) == single.tokens(prompt, 12, **sampling)


def test_fifty_concurrent_mixed_requests_equal_single_process_runs(
    cluster: Cluster, single: Reference
) -> None:
    rng = random.Random(50)
    cases = [
        (make_prompt(rng, rng.choice([1, 5, 31, 64, 200, 700])), rng.randint(1, 24), sampling)
        for sampling in (GREEDY, SEEDED, PENALISED)
        for _ in range(17)
    ][:50]
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(lambda case: served(cluster, *case), cases))
    for (prompt, tokens, sampling), answer in zip(cases, answers, strict=True):
        assert answer == single.tokens(prompt, tokens, **sampling)
    cluster.wait_idle()
