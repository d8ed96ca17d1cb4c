"""A model with cached latents and shared experts, split over ranks on both sides, in service."""

import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.runner import Chunk
from launch.builtin import MODEL_DIR
from tests.integration.cluster import Cluster, some_slow
from tests.integration.conftest import BLOCK, Reference, reference
from tests.unit.engine.checkpoints import DEEPSEEK_V3, make_checkpoint

VOCABULARY = 500
# Of prefill and of decode: latents are on every tp rank, and dealt to those of cp.
LAYOUTS = {
    "cp2 to dp2 x ep2": (("--cp", "2"), ("--dp", "2", "--ep", "2")),
    "tp2 to one": (("--tp", "2"), ()),
    "pp2 to tp2": (("--pp", "2"), ("--tp", "2")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_checkpoint(
        tmp_path_factory.mktemp("latent"),
        DEEPSEEK_V3,
        vocab_size=VOCABULARY,
        rope={"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, made / name)
    return made


@pytest.fixture(scope="module", params=some_slow(LAYOUTS, "cp2 to dp2 x ep2"))
def split(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    prefill, decode = LAYOUTS[request.param]
    flags = ("--dtype", "float32", "--block-size", str(BLOCK))
    more = {"prefill": prefill, "decode": decode}
    with Cluster(folder, tmp_path_factory.mktemp("logs"), *flags, more_flags=more) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> Reference:
    return reference(folder)


def test_every_token_is_a_best_one_of_one_rank(split: Cluster, one_rank: Reference) -> None:
    """By teacher forcing: of two that are as good, rounding decides."""
    rng = random.Random(4)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in (1, 31, 32, 33, 200, 700)]

    def answer(prompt: list[int]) -> list[int]:
        with split.client() as client:
            done = client.complete(prompt, max_new_tokens=20, ignore_eos=True, timeout_s=60)
        return list(done.token_ids)

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(answer, prompts))
    for prompt, tokens in zip(prompts, answers, strict=True):
        chunk = Chunk(token_ids=prompt + tokens, start=0, block_table=range(40))
        (logits_TV,) = one_rank.runner.forward_all([chunk])
        rows_TV = logits_TV[len(prompt) - 1 : -1]
        short_T = rows_TV.amax(-1) - rows_TV[range(len(tokens)), tokens]
        assert len(tokens) == 20
        assert short_T.max() < 1e-3
    split.wait_idle()
