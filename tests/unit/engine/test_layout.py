"""What part of a model a rank has where experts and sequences are split, and what cannot be."""

from pathlib import Path
from typing import Any

import pytest

from engine.config import load_config
from engine.errors import UnsupportedError
from engine.parallel import Layout
from tests.unit.engine.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six experts of an inner size of 12; 4 query heads, 2 KV heads."""
    folder = tmp_path_factory.mktemp("moe")
    return make_checkpoint(folder, num_experts=6, moe_intermediate_size=12)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dense"), "Qwen3ForCausalLM")


def test_ranks_are_numbered_with_dp_slowest_and_tp_fastest() -> None:
    found = [
        Layout(dp=2, dp_rank=dp, pp=3, pp_rank=pp, tp=2, tp_rank=tp).rank
        for dp in range(2)
        for pp in range(3)
        for tp in range(2)
    ]
    assert found == list(range(12))
    assert Layout(dp=2, pp=3, tp=2).ranks == 12
    assert [Layout(cp=2, cp_rank=cp, tp=2, tp_rank=1).rank for cp in range(2)] == [1, 3]


@pytest.mark.parametrize(
    ("dp", "tp", "ep"), [(2, 2, 1), (2, 2, 2), (2, 2, 4), (1, 4, 2), (3, 2, 3)]
)
def test_the_ranks_of_a_stage_have_every_part_of_every_expert_once(
    dp: int, tp: int, ep: int
) -> None:
    ranks = [
        Layout(dp=dp, dp_rank=rank // tp, tp=tp, tp_rank=rank % tp, ep=ep, pp=2)
        for rank in range(dp * tp)
    ]
    assert [layout.expert_rank for layout in ranks] == list(range(dp * tp))
    held = [
        (expert, inner)
        for layout in ranks
        for expert in layout.expert_part(7)
        for inner in range(12)[layout.expert_inner_part(12)]
    ]
    assert sorted(held) == [(expert, inner) for expert in range(7) for inner in range(12)]
    # Neighbours share an expert.
    assert [layout.ep_rank for layout in ranks] == [
        rank * ep // (dp * tp) for rank in range(dp * tp)
    ]


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tp": 4, "ep": 3}, r"ep=3 does not divide the 4 ranks .* use ep=1, 2, 4$"),
        ({"ep": 2}, r"ep=2 does not divide the 1 ranks .* use ep=1$"),
        ({"ep": 0}, "ep=0 does not divide"),
        ({"dp": 2, "dp_rank": 2}, "rank 2 of dp=2 does not exist"),
        ({"dp": 2, "cp": 2}, "cp=2: with ep=1 and dp=2 it must be 1"),
        ({"tp": 2, "ep": 2, "cp": 2}, "cp=2: with ep=2 and dp=1 it must be 1"),
        ({"dp": 2, "tp": 2, "sequence_parallel": True}, "sequence parallelism: .* must be off"),
    ],
)
def test_a_split_that_cannot_be_is_refused(degrees: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        Layout(**degrees)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"dp": 8, "ep": 8}, r"one of the 6 experts.* use ep=2, 4, or another dp or tp$"),
        ({"dp": 4, "tp": 2}, r"its 8 ranks must divide their inner size of 12; use ep=2, 4"),
        ({"dp": 7}, r"its 7 ranks .*; use another dp or tp$"),
    ],
)
def test_a_split_of_experts_that_cannot_be_is_refused_with_what_would_do(
    degrees: dict[str, Any], message: str, moe: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        Layout(**degrees).check(load_config(moe))


@pytest.mark.parametrize("degrees", [{"dp": 2, "tp": 4, "ep": 4}, {"dp": 4}, {"dp": 3, "ep": 3}])
def test_a_split_of_experts_that_can_be_is_let_through(degrees: dict[str, Any], moe: Path) -> None:
    Layout(**degrees).check(load_config(moe))


def test_ep_without_experts_is_refused_and_dp_is_not(dense: Path) -> None:
    with pytest.raises(UnsupportedError, match="ep=2: the model has no experts; use ep=1"):
        Layout(tp=2, ep=2).check(load_config(dense))
    Layout(dp=2, tp=2).check(load_config(dense))
