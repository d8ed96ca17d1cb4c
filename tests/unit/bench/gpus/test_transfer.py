"""KV between caches as on a GPU: two processes, with the memory of a CPU in its place."""

import pytest
import torch

from bench.gpus import transfer
from bench.gpus.transfer import measure
from bench.movers.works import Ranks, Request
from bench.report import GrowingReport

SMALL = Request(source=Ranks(), target=Ranks(), layers=3, kv_heads=2, head_size=16, block_size=8)


@pytest.mark.parametrize("way", ["at once", "by tcp", "by shm"])
def test_all_bytes_arrive_and_are_measured(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_WARM_UP", 1)
    figures = GrowingReport("any", None)
    measure(torch.device("cpu"), way, 2, figures, request=SMALL, tokens=(64,))
    assert not figures.failed
    (row,) = figures.rows.values()
    assert row.row == f"KV of 64 tokens, GPU to GPU, {way}"
    assert row.ours > 0
    assert row.limit
    assert (row.peer is None) == (way == "at once")
