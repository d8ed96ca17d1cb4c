"""What steps take, learned from steps."""

import random

import pytest

from service.step_fit import MIN_STEPS, StepFit


def test_nothing_is_known_of_few_steps() -> None:
    fit = StepFit()
    for _ in range(MIN_STEPS - 1):
        fit.observe(1, 10, 0.01)
    assert fit.speed is None
    fit.observe(1, 10, 0.01)
    assert fit.speed is not None


def test_parts_are_told_apart() -> None:
    rng, fit = random.Random(1), StepFit()
    for _ in range(2000):
        sequences, tokens = rng.randrange(1, 64), rng.randrange(1, 100_000)
        seconds = 0.01 + 2e-4 * sequences + 1e-7 * tokens
        fit.observe(sequences, tokens, seconds * rng.uniform(0.95, 1.05))
    speed = fit.speed
    assert speed is not None
    assert speed.base_s == pytest.approx(0.01, rel=0.05)
    assert speed.sequence_s == pytest.approx(2e-4, rel=0.05)
    assert speed.token_s == pytest.approx(1e-7, rel=0.05)


def test_steps_that_are_all_alike_are_foretold_as_they_were() -> None:
    fit = StepFit()
    for _ in range(100):
        fit.observe(4, 1000, 0.02)
    speed = fit.speed
    assert speed is not None
    assert speed.base_s + 4 * speed.sequence_s + 1000 * speed.token_s == pytest.approx(
        0.02, rel=0.01
    )
    assert speed.base_s == pytest.approx(0.02, rel=0.05)


def test_no_part_is_negative() -> None:
    rng, fit = random.Random(2), StepFit()
    for _ in range(500):
        sequences = rng.randrange(1, 64)
        fit.observe(sequences, rng.randrange(1, 1000), 0.02 - 1e-4 * sequences)
    speed = fit.speed
    assert speed is not None
    assert min(speed.base_s, speed.sequence_s, speed.token_s) >= 0
    assert speed.sequence_s == 0


def test_what_has_changed_is_soon_believed() -> None:
    rng, fit = random.Random(3), StepFit()
    for seconds in (0.01, 0.05):
        for _ in range(3000):
            fit.observe(rng.randrange(1, 64), 1000, seconds)
    speed = fit.speed
    assert speed is not None
    assert speed.base_s + speed.token_s * 1000 == pytest.approx(0.05, rel=0.05)
