"""Our engine on one rank: chunks of the budget that prefill serves with, first tokens sampled."""

import time
from pathlib import Path
from typing import Any

import torch

from bench.prefills.works import BLOCK_SIZE, Work, block_table, passes
from bench.sides.answers import serve
from engine.config import load_config
from engine.runner import Chunk, ModelRunner
from engine.sampling import SamplingParams, SequenceState, sample
from service.malloc import keep_freed_memory


class Ours:
    """A runner with a cache for one work at a time."""

    def open(self, *, model: str, num_blocks: int, budget: int) -> dict[str, Any]:
        """Load the model."""
        config = load_config(Path(model))
        self._budget = budget
        self._runner = ModelRunner(
            folder=Path(model),
            config=config,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
        )
        self._runner.warm_up()
        return {"version": "ours"}

    def run(self, *, prompts: list[list[int]]) -> dict[str, Any]:
        """Answer with the seconds from the prompts to the first token of all."""
        began = time.perf_counter()
        work = Work(tokens=len(prompts[0]), count=len(prompts))
        tokens: dict[int, int] = {}
        for spans in passes(work, self._budget):
            chunks = [
                Chunk(
                    token_ids=prompts[span.prompt][span.start : span.end],
                    start=span.start,
                    block_table=block_table(work, span.prompt, BLOCK_SIZE),
                )
                for span in spans
            ]
            logits_SV = self._runner.forward(chunks)
            ended = [row for row, span in enumerate(spans) if span.end == work.tokens]
            if ended:
                states = [SequenceState(SamplingParams(), prompt_len=work.tokens) for _ in ended]
                found = sample(logits_SV[ended], states)
                for row, sampled in zip(ended, found, strict=True):
                    tokens[spans[row].prompt] = sampled.token_id
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": [tokens[i] for i in range(work.count)]}


if __name__ == "__main__":
    keep_freed_memory()
    side = Ours()
    serve({"open": side.open, "run": side.run})
