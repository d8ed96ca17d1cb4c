"""What a prefill instance of several ranks makes of its settings, and what it refuses."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from prefill.config import PrefillConfig
from service.errors import StartError
from service.ranks.group import check_layout, layout_of, rank_name
from service.threads import default_threads

MODEL = Path("model")


def test_ranks_are_the_product_and_tp_is_fastest() -> None:
    settings = PrefillConfig(model=MODEL, cp=3, tp=2, block_size=16, cp_grain=48)
    assert settings.ranks == 6
    places = [layout_of(settings, rank) for rank in range(6)]
    assert [(place.cp_rank, place.tp_rank) for place in places] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    assert {place.cp_grain for place in places} == {48}


def test_a_deterministic_instance_takes_no_ring() -> None:
    assert PrefillConfig(model=MODEL, deterministic=True, tp=2, pp=2).deterministic
    with pytest.raises(ValidationError, match="--deterministic: found --cp 2"):
        PrefillConfig(model=MODEL, deterministic=True, cp=2)


def test_stages_are_slowest_and_named_in_logs() -> None:
    settings = PrefillConfig(model=MODEL, pp=2, tp=2)
    assert settings.ranks == 4
    places = [layout_of(settings, rank) for rank in range(4)]
    assert [(place.pp_rank, place.tp_rank) for place in places] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [rank_name(settings, rank) for rank in (0, 3)] == ["0 pp0 tp0", "3 pp1 tp1"]


def test_grain_is_open_where_several_cp_ranks_are_given_none() -> None:
    assert layout_of(PrefillConfig(model=MODEL, cp=2, tp=2), 3).grain_is_open
    assert not layout_of(PrefillConfig(model=MODEL, cp=2, cp_grain=64), 1).grain_is_open
    assert not layout_of(PrefillConfig(model=MODEL, tp=2), 1).grain_is_open


def test_grain_that_cuts_blocks_is_refused() -> None:
    with pytest.raises(ValidationError, match="must be a multiple of --block-size, 32"):
        PrefillConfig(model=MODEL, cp=2, cp_grain=40)


def test_threads_are_shared_by_the_ranks_unless_they_are_given() -> None:
    assert PrefillConfig(model=MODEL, cp=2, threads=5).rank_threads == 5
    assert PrefillConfig(model=MODEL, cp=2).rank_threads == max(1, default_threads() // 2)
    # The other ranks are told what was given, and come to the same.
    told = PrefillConfig(model=MODEL, cp=2).model_dump_json(exclude_unset=True)
    assert PrefillConfig.model_validate_json(told).rank_threads == max(1, default_threads() // 2)


def test_other_number_of_ranks_than_torchrun_started_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(os.environ, "RANK", "0")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "3")
    with pytest.raises(StartError, match="make 2 ranks, but torchrun has started 3"):
        check_layout(PrefillConfig(model=MODEL, cp=2))
