"""What a decode instance makes of its settings, and what it refuses."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from decode.config import DecodeConfig
from service.ranks.group import layout_of

MODEL = Path("model")


def test_dp_is_slowest_and_tp_fastest() -> None:
    settings = DecodeConfig(model=MODEL, dp=2, pp=2, tp=2, ep=4)
    assert settings.ranks == 8
    places = [layout_of(settings, rank) for rank in range(8)]
    assert [(p.dp_rank, p.pp_rank, p.tp_rank) for p in places] == [
        (dp, pp, tp) for dp in range(2) for pp in range(2) for tp in range(2)
    ]
    assert {place.ep for place in places} == {4}
    assert [settings.dp_ranks(dp_rank) for dp_rank in range(2)] == [range(4), range(4, 8)]


def test_experts_that_move_under_a_sum_by_place_are_not_deterministic() -> None:
    asked = {"model": MODEL, "dp": 2, "ep": 2, "deterministic": True, "dispatch": "allgather"}
    with pytest.raises(ValidationError, match="use --dispatch alltoall or padded"):
        DecodeConfig.model_validate(asked)
    DecodeConfig.model_validate({**asked, "dispatch": "padded"})
    DecodeConfig.model_validate({**asked, "balance_interval_s": 0})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"colocated": True, "local_prefill_tokens": 16}, "--chunk-tokens is the bound"),
        ({"chunk_tokens": 256}, "found 256 without --colocated"),
        ({"colocated": True, "chunk_tokens": 64}, "--max-batch 64 may take alone"),
    ],
)
def test_bounds_on_prompts_that_do_not_go_together_are_refused(
    asked: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        DecodeConfig.model_validate({"model": MODEL, **asked})


def test_prompts_are_bounded_by_what_is_computed_here() -> None:
    assert DecodeConfig(model=MODEL).prompt_tokens == 32
    assert DecodeConfig(model=MODEL, colocated=True).prompt_tokens == 512
    asked = {"model": MODEL, "colocated": True, "chunk_tokens": 8, "max_batch": 7}
    assert DecodeConfig.model_validate(asked).prompt_tokens == 8
