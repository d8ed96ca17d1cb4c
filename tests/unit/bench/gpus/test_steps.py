"""Whole steps of a GPU's models, as far as they can be measured without one."""

from dataclasses import replace

import pytest
import torch

from bench.gpus import steps
from bench.gpus.steps import WORKS, Weights, measure
from bench.report import GrowingReport
from tests.unit.bench.gpus.tiny import tiny

CPU = torch.device("cpu")
NAMES = [
    f"{name}, step, {of} keys"
    for name in ("8B, dense", "30B, 3B active")
    for of in ("1 x 40", "3 x 20")
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    works = tuple(replace(tiny(work), steps=((1, 40), (3, 20))) for work in WORKS)
    monkeypatch.setattr(steps, "WORKS", works)


def test_every_step_of_every_shape_is_measured() -> None:
    figures = GrowingReport("any", None)
    measure(CPU, "", 4, figures)
    assert not figures.failed
    assert list(figures.rows) == NAMES
    rows = figures.rows.values()
    assert all(row.ours > 0 and row.peer and row.peer > 0 for row in rows)


@pytest.mark.parametrize(("pattern", "quick"), [("1 x", False), ("", True)])
def test_a_pattern_or_the_quick_ones_choose(pattern: str, quick: bool) -> None:
    figures = GrowingReport("any", None)
    measure(CPU, pattern, 4, figures, quick=quick)
    assert list(figures.rows) == NAMES[::2]


def test_bytes_that_a_step_reads_are_those_of_the_published_models() -> None:
    dense, sparse = (work.config for work in WORKS)
    weights = Weights()
    weights._always, weights._of_experts = 10, 1600
    assert weights.read_bytes(dense, 7) == 10
    assert weights.read_bytes(sparse, 1) == pytest.approx(10 + 1600 / 16)
    assert weights.read_bytes(sparse, 10_000) == pytest.approx(1610)
