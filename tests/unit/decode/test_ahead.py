"""Steps laid out ahead: what was guessed right is used, and nothing else."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from decode.ahead import Ahead, Coming
from engine.errors import BatchError

A, B, C = object(), object(), object()


def coming(*sequences: object, start: int = 5, dp_tokens: Sequence[int] | None = None) -> Any:
    starts = [start + number for number in range(len(sequences))]
    return Coming(sequences=sequences, starts=starts, dp_tokens=dp_tokens or [len(sequences)])


class Layouts:
    """Stands for the runner: inputs say which step they are of, and who has laid them out."""

    def __init__(self) -> None:
        self.lacking: set[int] = set()
        self.made: list[tuple[list[int], str]] = []

    def __call__(self, step: Coming[object]) -> Any:
        if self.lacking & set(step.starts):
            raise BatchError("a block is missing")
        self.made.append((list(step.starts), threading.current_thread().name))
        return step


@pytest.fixture
def layouts() -> Layouts:
    return Layouts()


def test_the_step_that_follows_is_laid_out_by_another_thread(layouts: Layouts) -> None:
    ahead = Ahead(layouts, depth=1)
    first = coming(A, B)
    found: Any = ahead.inputs(first)
    assert found is first
    ahead.follow(first)
    found = ahead.inputs(coming(A, B, start=6))
    assert found.starts == [6, 7]
    own, other = (name for _, name in layouts.made)
    assert own == threading.current_thread().name
    assert other.startswith("decode-inputs")


@pytest.mark.parametrize(
    "actual",
    [
        coming(A, start=6),
        coming(A, C, start=6),
        coming(B, A, start=6),
        coming(A, B, C, start=6),
        coming(A, B, start=7),
        coming(A, B, start=6, dp_tokens=[2, 1]),
    ],
)
def test_another_step_than_the_guessed_one_is_laid_out_anew(layouts: Layouts, actual: Any) -> None:
    ahead = Ahead(layouts, depth=1)
    ahead.follow(coming(A, B))
    assert ahead.inputs(actual) is actual


def test_what_failed_ahead_is_tried_when_its_time_has_come(layouts: Layouts) -> None:
    ahead = Ahead(layouts, depth=1)
    layouts.lacking = {6}
    ahead.follow(coming(A))
    step = coming(A, start=6)
    with pytest.raises(BatchError):
        ahead.inputs(step)
    ahead.follow(coming(A))
    layouts.lacking = set()
    found: Any = ahead.inputs(step)
    assert found.starts == [6]


def test_as_many_steps_are_followed_as_are_under_way(layouts: Layouts) -> None:
    ahead = Ahead(layouts, depth=2)
    for step in (coming(A), coming(B), coming(C)):
        ahead.follow(step)
    for sequence in (C, B):
        step = coming(sequence, start=6)
        assert ahead.inputs(step) is not step
    step = coming(A, start=6)
    assert ahead.inputs(step) is step
