"""Every variant over real processes and gloo, against exact attention on one rank."""

from dataclasses import asdict
from typing import Any

import pytest

from engine.ring.choose import AttentionShape, Load, pass_kv_bytes, pass_q_bytes
from tests.integration.ring.ranks import WAIT_S, Ranks

VARIANTS = ["pass-kv", "pass-q", "gather-kv"]
SHAPES = {
    "multi-query": AttentionShape(heads=4, kv_heads=1, head_size=16, element_bytes=4),
    "grouped": AttentionShape(heads=8, kv_heads=2, head_size=32, element_bytes=4),
    "multi-head": AttentionShape(heads=4, kv_heads=4, head_size=16, element_bytes=4),
    "windowed": AttentionShape(heads=8, kv_heads=2, head_size=32, element_bytes=4, window=37),
}
# (cached, new) of each sequence of a pass.
BATCHES = {
    "even": [(0, 96)],
    "ragged": [(0, 101)],
    "long": [(0, 1111)],
    "fewer tokens than ranks": [(0, 1), (0, 3)],
    "short after a long prefix": [(700, 5)],
    "one token after a prefix": [(131, 1)],
    "long after a short prefix": [(3, 257)],
    "mixed": [(0, 77), (250, 31), (64, 64), (19, 1), (0, 2)],
    "a sequence without new tokens": [(40, 0), (10, 30)],
}

sizes = pytest.mark.parametrize("size", [2, 3, 4])
variants = pytest.mark.parametrize("variant", VARIANTS)


def run(ranks: Ranks, size: int, shape: AttentionShape, **case: Any) -> list[dict[str, Any]]:
    full = {"seed": 0, "scatter": False, "dtype": "float32", **case}
    return ranks.ask(size, "run", ranks=size, shape=asdict(shape), **full)


@sizes
@variants
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_every_variant_agrees_with_one_rank(
    ranks: Ranks,
    size: int,
    variant: str,
    shape: AttentionShape,
    lengths: list[tuple[int, int]],
) -> None:
    for answer in run(ranks, size, shape, variant=variant, lengths=lengths):
        assert answer["finite"]
        assert answer["error"] <= 1e-5


@sizes
@variants
def test_cached_prefixes_of_every_length_agree(ranks: Ranks, size: int, variant: str) -> None:
    for cached in range(50):
        lengths = [(cached, 11), (50 - cached, cached)]
        for answer in run(
            ranks,
            size,
            SHAPES["grouped"],
            variant=variant,
            lengths=lengths,
            seed=cached,
            scatter=cached % 2 == 1,
        ):
            assert answer["error"] <= 1e-5


@sizes
@variants
@pytest.mark.parametrize("window", [1, 2, 16, 61, 400])
def test_windows_agree(ranks: Ranks, size: int, variant: str, window: int) -> None:
    shape = AttentionShape(heads=4, kv_heads=2, head_size=16, element_bytes=4, window=window)
    lengths = [(0, 120), (200, 33), (59, 3)]
    for answer in run(ranks, size, shape, variant=variant, lengths=lengths, scatter=True):
        assert answer["error"] <= 1e-5


@sizes
@variants
def test_bfloat16_agrees_within_its_rounding(ranks: Ranks, size: int, variant: str) -> None:
    shape = SHAPES["grouped"]
    for answer in run(
        ranks, size, shape, variant=variant, lengths=BATCHES["mixed"], dtype="bfloat16"
    ):
        assert answer["error"] <= 2**-6  # a unit in the last place of values up to 4


@sizes
@variants
@pytest.mark.parametrize("lengths", [[(0, 1203)], [(900, 101)], BATCHES["mixed"]])
@pytest.mark.parametrize("shape", [SHAPES["grouped"], SHAPES["windowed"]], ids=["all", "window"])
def test_bytes_sent_are_those_of_the_formula(
    ranks: Ranks,
    size: int,
    variant: str,
    lengths: list[tuple[int, int]],
    shape: AttentionShape,
) -> None:
    answers = run(ranks, size, shape, variant=variant, lengths=lengths)
    formula = pass_q_bytes if variant == "pass-q" else pass_kv_bytes
    wanted = sum(formula(Load(new, cached), shape, size) for cached, new in lengths)
    assert sum(answer["bytes_sent"] for answer in answers) == wanted
    if lengths == [(0, 1203)]:  # long enough for an even cut: each rank has its part of it
        for answer in answers:
            assert answer["bytes_sent"] == pytest.approx(wanted / size, rel=0.02)


def test_late_and_lost_messages_are_given_up(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Ranks of their own: gloo closes a pair of which one has timed out.
    with Ranks(3, tmp_path_factory.mktemp("ring")) as ranks:
        run(ranks, 3, SHAPES["grouped"], variant="pass-kv", lengths=[(0, 12)])
        ranks.tell(2, "leave", code=0)
        ranks.tell(0, "miss", source=2, timeout_s=WAIT_S)
        assert "rank 2's message to rank 0 was lost" in ranks.hear(0)["lost"]
        ranks.tell(0, "miss", source=1, timeout_s=0.1)
        assert "rank 1's message to rank 0" in ranks.hear(0)["lost"]
