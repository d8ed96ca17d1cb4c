"""A step's time by part, what ranks exchange, and the times between tokens."""

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from decode.admission import Admission
from decode.compute import DecodeSequence, RankCompute, Row, Steps
from decode.prefixes import Prefixes
from decode.scheduler import Scheduler
from decode.sequence import Reservation
from decode.step_metrics import RankSteps, StepMetrics
from decode.worker import Step, Token, Worker
from engine.blocks import BlockPool
from engine.cache_memory import CacheItself
from engine.config import load_config
from engine.dispatch import Members
from engine.runner import ModelRunner
from engine.sampling import Sampled, SamplingParams, SequenceState
from engine.step_watch import ATTENTION, EXPERTS, HEAD, REST, SAMPLING, StepWatch
from engine.stopping import StopCriteria
from engine.tally import Count
from tests.unit.engine.checkpoints import make_checkpoint
from tests.unit.engine.dispatch.loopback import on_ranks

BLOCK_SIZE = 8
WAIT_S = 20.0


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe"))


def made_runner(folder: Path, **more: Any) -> ModelRunner:
    return ModelRunner(
        folder=folder,
        config=load_config(folder),
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_blocks=8,
        block_size=BLOCK_SIZE,
        keeps_logits=True,
        **more,
    )


def step_of(
    request_ids: Sequence[int],
    gap_s: float = 0.0,
    wait_s: float = 0.0,
    finish: str | None = None,
) -> Step:
    sampled = Sampled(token_id=1)
    tokens = [Token(request_id=r, sampled=sampled, finish=finish) for r in request_ids]
    return Step(
        tokens={"router": tokens},
        seconds=1.0,
        forward_s=0.75,
        sample_s=0.25,
        gap_s=gap_s,
        wait_s=wait_s,
    )


class Scraped:
    """Step metrics of two ranks, and their clock."""

    def __init__(self) -> None:
        self.now = 50.0
        self.registry = CollectorRegistry()
        counts = {0: {"all_reduce": Count(4, 400)}, 1: {"all_reduce": Count(4, 200)}}
        self.metrics = StepMetrics(
            self.registry,
            ranks=lambda: {
                rank: RankSteps(seconds={"attention": 1.0 + rank}, collectives=each)
                for rank, each in counts.items()
            },
            most_rows=4,
            clock=lambda: self.now,
        )

    def value(self, name: str, **labels: object) -> float | None:
        texts = {key: str(value) for key, value in labels.items()}
        return self.registry.get_sample_value(f"twinpool_decode_{name}", texts)


def test_all_ranks_parts_and_collectives_are_told() -> None:
    scraped = Scraped()
    scraped.metrics.observe(step_of([1, 2, 3], gap_s=0.5, wait_s=0.25))
    scraped.metrics.observe(step_of([1], gap_s=0.5))
    for rank in (0, 1):
        assert scraped.value("step_part_seconds_total", rank=rank, part="attention") == 1.0 + rank
        assert scraped.value("collective_calls_total", rank=rank, kind="all_reduce") == 4
    assert scraped.value("collective_bytes_total", rank=1, kind="all_reduce") == 200
    assert scraped.value("step_part_seconds_total", rank=0, part="gap") == 1.0
    assert scraped.value("step_part_seconds_total", rank=0, part="others") == 0.25
    assert scraped.value("step_part_seconds_total", rank=1, part="gap") is None
    assert scraped.value("batch_fill_sum") == 1.0
    assert scraped.value("batch_fill_bucket", le="0.3") == 1


def test_time_between_tokens_is_each_sequences_own() -> None:
    scraped = Scraped()
    for request_ids in ([1, 2], [1], [1, 2]):
        scraped.metrics.observe(step_of(request_ids))
        scraped.now += 2.0
    # Sequence 1 twice after 2 s, sequence 2 once after 4 s.
    assert scraped.value("inter_token_seconds_count") == 3
    assert scraped.value("inter_token_seconds_sum") == 8.0
    assert scraped.value("inter_token_seconds_bucket", le="2.5") == 2
    assert scraped.value("inter_token_seconds_bucket", le="5.0") == 3


def test_last_token_counts_and_ended_sequences_are_forgotten() -> None:
    scraped = Scraped()
    scraped.metrics.observe(step_of([1, 2]))
    scraped.now += 1.0
    scraped.metrics.ended(1)  # heard of before its last token is seen
    scraped.metrics.observe(step_of([1, 2]))
    assert scraped.value("inter_token_seconds_count") == 2
    assert scraped.metrics._latencies.held == 1
    scraped.metrics.ended(2)
    scraped.metrics.observe(step_of([]))
    assert scraped.metrics._latencies.held == 0


def test_sequence_of_a_single_step_is_not_remembered() -> None:
    scraped = Scraped()
    scraped.metrics.ended(1)
    scraped.metrics.observe(step_of([1], finish="length"))
    assert scraped.metrics._latencies.held == 0
    assert scraped.value("inter_token_seconds_count") == 0


def test_parts_add_up_to_the_steps(moe: Path) -> None:
    """Every look at the clock is a second: what is missing are the looks of the books alone."""
    ticks = itertools.count(1.0)

    def clock() -> float:
        return next(ticks)

    runner = made_runner(moe, watch=StepWatch(clock))
    steps = Steps(RankCompute(runner, CacheItself(runner.cache)))
    prefixes = [Prefixes(BlockPool(8), layers=3)]
    admission = Admission(
        prefixes=prefixes, block_size=BLOCK_SIZE, max_sequences=4, revoke=lambda _: None
    )
    emitted: list[Step] = []
    over = threading.Event()

    def emit(step: Step) -> None:
        emitted.append(step)
        if any(token.finish for of_router in step.tokens.values() for token in of_router):
            over.set()

    worker = Worker(
        compute=steps,
        admission=admission,
        scheduler=Scheduler(max_batch=4),
        emit=emit,
        on_fatal=lambda error: over.set(),
        clock=clock,
    )
    record = admission.reserve(
        Reservation(
            request_id=1,
            router_id="r",
            prompt_tokens=5,
            prompt_ids=(),
            sampling=SamplingParams(),
            stop=StopCriteria(max_new_tokens=9, ignore_eos=True),
            ttl_s=60,
        )
    )
    steps.add(record)
    admission.activate(1, 3)
    admission.complete(record.transfer.transfer_id)
    worker.ready(1)
    worker.start()
    assert over.wait(WAIT_S)
    worker.stop()
    assert len(emitted) == 8
    parts = runner.watch.seconds
    assert all(parts[part] > 0 for part in (ATTENTION, EXPERTS, HEAD, SAMPLING, REST))
    wall_s = sum(step.forward_s + step.sample_s for step in emitted)
    counted_s = sum(parts.values()) + sum(step.wait_s for step in emitted)
    # Two seconds a step: before the watch begins, and after it has ended. Sampling has a clock of
    # its own.
    assert wall_s - 2 * len(emitted) - 1 <= counted_s <= wall_s


def test_collectives_of_steps_are_counted_as_theory_says(moe: Path) -> None:
    config = load_config(moe)
    steps, layers, hidden = 3, config.num_layers, config.hidden_size

    def on_rank(members: Members) -> None:
        runner = made_runner(
            moe,
            layout=members.layout,
            ranks=members.tp,
            experts=members.group,
            dispatch="allgather",
        )
        compute = RankCompute(runner, CacheItself(runner.cache))
        params = SamplingParams()
        for request_id in (1, 2):
            state = SequenceState(params, prompt_len=1)
            compute.add(request_id, DecodeSequence(blocks=[request_id], sampling=state))
        for number in range(steps):
            compute.run([[Row(1, 7, 1 + number), Row(2, 8, 1 + number)]])
        counts = runner.tally.so_far()
        # The embedding's sum and attention's in each layer; the experts' are their group's.
        reduces = steps * (1 + layers)
        assert counts["all_reduce"] == Count(reduces, reduces * 2 * hidden * 4)
        assert counts["expert_all_reduce"] == Count(steps * layers, steps * layers * 2 * hidden * 4)
        assert counts["all_gather"].calls == steps  # greedy: the best of each part

    on_ranks(on_rank, tp=2, ep=2)
