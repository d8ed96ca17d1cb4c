"""Whole models beside transformers, as far as they can be measured without a GPU."""

import pytest
import torch

from bench.gpus import models
from bench.gpus.models import Transformers, measure
from bench.gpus.steps import WORKS, Work
from bench.report import GrowingReport
from engine.runner import ModelRunner
from tests.unit.bench.gpus.tiny import tiny

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "WORKS", tuple(tiny(work) for work in WORKS))
    monkeypatch.setattr(models, "_CHUNK", 16)


@pytest.mark.usefixtures("small")
def test_every_batch_and_prompt_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transformers, "decode", lambda *_: [7.0] * 16)
    figures = GrowingReport("any", None)
    measure(CPU, "", figures, batches=((1, 40), (3, 20)), prompts=(33,), steps=16, repeats=4)
    assert not figures.failed
    assert list(figures.rows) == [
        f"{name}, {what}"
        for name in ("8B, dense", "30B, 3B active")
        for what in ("decode, 1 x 40 keys", "decode, 3 x 20 keys", "prefill, 33 tokens")
    ]
    rows = figures.rows.values()
    assert all(row.ours > 0 and row.peer and row.peer > 0 for row in rows)


@pytest.mark.usefixtures("small")
def test_ours_is_kept_where_the_peer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Transformers, "decode", fail)
    figures = GrowingReport("any", None)
    measure(CPU, "8B", figures, batches=((1, 40),), prompts=(33,), steps=16, repeats=4)
    decode, prefill = figures.rows.values()
    assert decode.ours > 0
    assert decode.peer is None
    assert prefill.peer
    assert figures.failed == [f"{decode.row}, transformers"]


@pytest.mark.slow  # 15 s until its continuous batching has begun
def test_the_peer_decodes_batches() -> None:
    rates = Transformers(tiny(WORKS[0]).config, CPU).decode(3, 20, 24)
    assert len(rates) > 12
    assert min(rates) > 0


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_both_engines_have_as_many_weights(work: Work) -> None:
    config = tiny(work).config
    counted: list[int] = []
    ModelRunner(
        folder=None,
        config=config,
        dtype=torch.bfloat16,
        device=CPU,
        num_blocks=1,
        block_size=32,
        fill=lambda slots: counted.extend(slot.target.numel() for slot in slots),
    )
    theirs = Transformers(config, CPU)._model
    assert sum(counted) == sum(each.numel() for each in theirs.parameters())
