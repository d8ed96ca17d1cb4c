"""What does a request pay for prefill and decode being apart?

Runs a whole system as `twinpool serve` does and, in turn with each request, the same prompt's
prefill alone in this process: same weights, threads and dtype. Measures

- what the way through router, admission and streams adds to the time to first token;
- the hand-over: from the first token to decode's own first, beyond one decode step.
"""

import asyncio
import random
import re
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from twinpool import AsyncClient

from bench.report import Row, median_and_spread, report
from launch.builtin import MODEL_DIR
from launch.cluster import Cluster, ClusterConfig
from service.malloc import keep_freed_memory
from service.threads import default_threads, set_thread_env

PROMPT_TOKENS = (128, 512, 2048)
NEW_TOKENS = 12
WARM_UP = 5


@dataclass
class Samples:
    """Seconds, one entry a request."""

    ttft_s: list[float] = field(default_factory=list)
    alone_s: list[float] = field(default_factory=list)
    handover_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)

    def rows(self, tokens: int) -> list[Row]:
        """The figures of one prompt length."""
        ttft, ttft_spread = median_and_spread(self.ttft_s)
        added, added_spread = median_and_spread(
            [served - alone for served, alone in zip(self.ttft_s, self.alone_s, strict=True)]
        )
        handover, handover_spread = median_and_spread(self.handover_s)
        step, step_spread = median_and_spread(self.step_s)
        named = (
            ("TTFT", ttft, ttft_spread, statistics.median(self.alone_s)),
            ("added to TTFT", added, added_spread, None),
            ("hand-over beyond one step", handover, handover_spread, None),
            ("decode step", step, step_spread, None),
        )
        return [
            Row(
                row=f"{name}, {tokens} tokens",
                ours=value * 1e3,
                unit="ms",
                higher_is_better=False,
                limit=limit * 1e3 if limit is not None else None,
                spread=spread * 1e3,
            )
            for name, value, spread, limit in named
        ]


class Alone:
    """Prefill of a prompt in this process, with nothing around it."""

    def __init__(self, model: Path) -> None:
        import torch

        from engine.config import load_config
        from engine.runner import ModelRunner

        torch.set_num_threads(default_threads())
        keep_freed_memory()
        config = load_config(model)
        self.vocab_size = config.vocab_size
        self._runner = ModelRunner(
            folder=model,
            config=config,
            dtype=getattr(torch, config.dtype),
            device=torch.device("cpu"),
            num_blocks=256,
            block_size=32,
        )
        self._runner.warm_up()

    def prefill_s(self, prompt: list[int]) -> float:
        """Seconds from the prompt to its first token."""
        from engine.runner import Chunk
        from engine.sampling import SamplingParams, SequenceState, sample

        began = time.perf_counter()
        chunk = Chunk(token_ids=prompt, start=0, block_table=range(-(-len(prompt) // 32)))
        sample(
            self._runner.forward([chunk]), [SequenceState(SamplingParams(), prompt_len=len(prompt))]
        )
        return time.perf_counter() - began


async def _served(client: AsyncClient, prompt: list[int], samples: Samples) -> None:
    began = time.perf_counter()
    arrivals = []
    async with client.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True) as stream:
        async for chunk in stream:
            arrivals.extend([time.perf_counter()] * len(chunk.token_ids))
    gaps = [after - before for before, after in pairwise(arrivals)]
    step_s = statistics.median(gaps[1:])
    samples.ttft_s.append(arrivals[0] - began)
    samples.handover_s.append(gaps[0] - step_s)
    samples.step_s.append(step_s)


async def _measure(cluster: Cluster, lengths: list[int], repeats: int) -> list[Row]:
    alone = Alone(MODEL_DIR)
    rng = random.Random(0)
    rows = []
    async with AsyncClient(cluster.address) as client:
        for length in lengths:
            samples = Samples()
            for turn in range(WARM_UP + repeats):
                kept = samples if turn >= WARM_UP else Samples()
                prompt = [rng.randrange(alone.vocab_size) for _ in range(length)]
                await _served(client, prompt, kept)
                kept.alone_s.append(alone.prefill_s(prompt))
            rows += samples.rows(length)
    return rows


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    rows: Annotated[str, typer.Option(help="Only prompt lengths that this pattern matches.")] = "",
    repeats: Annotated[int, typer.Option(min=4, help="Requests for each prompt length.")] = 30,
) -> None:
    """Measure what disaggregation adds to TTFT, and the hand-over to decode."""
    set_thread_env()
    lengths = [tokens for tokens in PROMPT_TOKENS if re.search(rows, str(tokens))]
    figures: list[Row] = []

    async def work(cluster: Cluster) -> None:
        figures.extend(await _measure(cluster, lengths, repeats))

    config = ClusterConfig(port=0, restart=False, log_level="warning")
    asyncio.run(Cluster(config, print).run(work))
    report("What does a request pay for prefill and decode being apart?", figures, json)


if __name__ == "__main__":
    typer.run(main)
