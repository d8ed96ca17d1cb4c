"""Passes flow through stages in order, several at once, and give their logits to one rank."""

from collections import deque

import pytest
import torch

from engine.pipeline import Logits, Pipeline
from engine.ring import CommError, Wire
from tests.unit.engine.ring.threads import LoopbackComm, on_ranks

STAGES, PASSES, WIDTH, VOCAB = 3, 7, 4, 5


def stage(comm: LoopbackComm, *, leads: bool) -> Pipeline:
    device = torch.device("cpu")
    return Pipeline(Wire(comm), width=WIDTH, vocab_size=VOCAB, leads=leads, device=device)


def run(comm: LoopbackComm, *, leads: bool = True) -> list[torch.Tensor]:
    """Pass n has n rows and n sequences; each stage adds 1, and the last one makes logits of it."""
    pipeline = stage(comm, leads=leads)
    under_way, found = deque[Logits](), []
    for number in range(PASSES):
        x = pipeline.receive(number)
        assert (x is None) == (comm.rank == 0)
        x = torch.full((number, WIDTH), float(10 * number)) if x is None else x
        assert x.shape == (number, WIDTH)
        result = x + 1
        if comm.rank == STAGES - 1:
            result = result.mean(1, keepdim=True).expand(-1, VOCAB)
        under_way.append(pipeline.pass_on(result, number))
        if len(under_way) == STAGES:
            found.append(under_way.popleft().wait())
    return found + [each.wait() for each in under_way]


def test_logits_come_to_the_first_stage_in_order() -> None:
    first, *others = on_ranks(STAGES, run)
    for number, logits_SV in enumerate(first):
        assert logits_SV.equal(torch.full((number, VOCAB), 10.0 * number + STAGES))
    assert all(logits_SV.shape == (0, VOCAB) for stage in others for logits_SV in stage)


def test_ranks_that_do_not_lead_exchange_no_logits() -> None:
    for stage in on_ranks(STAGES, lambda comm: run(comm, leads=False)):
        assert all(logits_SV.shape == (0, VOCAB) for logits_SV in stage)


def test_lost_stage_is_noticed() -> None:
    alone = LoopbackComm(1, 2, {}, timeout_s=0.1)
    with pytest.raises(CommError):
        stage(alone, leads=True).receive(2)
