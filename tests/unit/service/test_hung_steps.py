"""Which steps are taken to hang: those that stay under way, and no others."""

import asyncio
from collections.abc import Iterator
from itertools import chain, count, repeat

import pytest

from service.hung_steps import StepHangs, end_where_a_step_hangs


async def deaths(looks: Iterator[int | None], timeout_s: float) -> list[BaseException]:
    """What the process dies of while its steps look like that; it ends with the looks."""
    died: list[BaseException] = []

    def step_under_way() -> int | None:
        return next(looks)

    try:
        async with asyncio.timeout(5):
            await end_where_a_step_hangs(step_under_way, timeout_s, died.append)
    except (StopIteration, RuntimeError):  # a coroutine turns the one into the other
        pass
    return died


async def test_step_that_stays_under_way_is_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    [death] = await deaths(repeat(7), 0.05)
    assert isinstance(death, StepHangs)
    assert "test_hung_steps.py" in capfd.readouterr().err


@pytest.mark.parametrize(
    "looks",
    [
        repeat(None, 40),
        chain.from_iterable(repeat(step, 9) for step in range(5)),
        iter(range(40)),
        chain.from_iterable([None, *repeat(step, 8)] for step in repeat(3, 5)),
    ],
    ids=["idle", "long steps", "short steps", "one number after a rest"],
)
async def test_engine_that_goes_on_lives(looks: Iterator[int | None]) -> None:
    assert await deaths(looks, 0.02) == []


async def test_without_a_limit_nothing_is_asked() -> None:
    asked = count()
    assert await deaths(asked, 0.0) == []
    assert next(asked) == 0
