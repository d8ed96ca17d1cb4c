"""When a sequence ends by its tokens."""

from typing import Any

import pytest

from engine.errors import SamplingError
from engine.stopping import StopCriteria


def test_end_tokens_stop_ids_and_length_end_a_sequence() -> None:
    stop = StopCriteria(
        max_new_tokens=3, stop_token_ids=frozenset({7}), eos_token_ids=frozenset({2})
    )
    assert stop.check(5, 1) is None
    assert stop.check(7, 1) == "stop"
    assert stop.check(2, 2) == "stop"
    assert stop.check(5, 3) == "length"
    assert stop.check(2, 3) == "stop"


def test_ignore_eos_leaves_the_requests_own_stop_ids() -> None:
    stop = StopCriteria(
        max_new_tokens=3,
        stop_token_ids=frozenset({7}),
        eos_token_ids=frozenset({2}),
        ignore_eos=True,
    )
    assert stop.check(2, 1) is None
    assert stop.check(7, 1) == "stop"
    assert stop.end_token_ids == {7}


def test_nothing_but_length_ends_a_sequence_before_min_new_tokens() -> None:
    stop = StopCriteria(max_new_tokens=3, min_new_tokens=2, eos_token_ids=frozenset({2}))
    assert stop.check(2, 1) is None
    assert stop.check(2, 2) == "stop"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("min_new_tokens", {"max_new_tokens": 3, "min_new_tokens": 4}),
        ("min_new_tokens", {"max_new_tokens": 3, "min_new_tokens": -1}),
        ("stop_token_ids", {"max_new_tokens": 3, "stop_token_ids": frozenset({-1})}),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(SamplingError, match=f"^{field} is "):
        StopCriteria(**values)
