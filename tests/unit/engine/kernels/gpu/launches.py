"""Which forms of which kernels a model's passes launch: each is compiled when it is first met.

A program of its own: Triton decides once in a process whether it interprets. Nothing is compiled or
run, so what passes compute is not looked at.
"""

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import engine.runner
from engine import kernels
from engine.config import load_config
from engine.kernels.gpu import decode, latent
from engine.runner import Chunk, ModelRunner
from engine.sampling import SamplingParams, SequenceState, sample
from tests.unit.engine.kernels.gpu.compiles import AbsentGPU

BLOCK, BLOCKS = 16, 96


@contextmanager
def noted() -> Iterator[set[tuple[str, str]]]:
    """Note the forms that are launched, and run none."""
    driver.set_active(AbsentGPU())
    found, run = set(), JITFunction.run

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        *_, binder = kernel.device_caches[0]
        bound, form, others = binder(*args, **options, debug=False)
        named = {
            name: of
            for name, of, value in zip(bound, form, bound.values(), strict=True)
            if of[0] != "constexpr" or not isinstance(value, torch.Tensor)
        }
        found.add((kernel.__name__, f"{named} {sorted(others.items())}"))

    JITFunction.run = note
    try:
        yield found
    finally:
        JITFunction.run = run


def passes(runner: ModelRunner, rng: random.Random) -> None:
    """Run passes as an instance does: prompts in pieces, with a cached prefix, steps, and both."""
    most = BLOCK * BLOCKS
    chunks = []
    for _ in range(rng.randrange(1, 6)):
        is_step = rng.random() < 0.5
        tokens = 1 if is_step else rng.choice((1, 2, 15, 16, 17, 31, 100, 256, 500))
        start = rng.randrange(0 if not is_step else 1, most - tokens)
        table = [rng.randrange(BLOCKS) for _ in range(-(-(start + tokens) // BLOCK))]
        chunks.append(
            Chunk(token_ids=[1] * tokens, start=start, block_table=table, is_prompt=not is_step)
        )
    logits_SV = runner.forward(chunks)
    drawn = SamplingParams(temperature=0.9, top_k=5, top_p=0.9, seed=1)
    states = [
        SequenceState(rng.choice((SamplingParams(), drawn)), prompt_len=chunk.end)
        for chunk in chunks
    ]
    sample(logits_SV.nan_to_num(0.0), states)


def new_forms(folder: Path, *, all_forms: bool) -> list[str]:
    """Warm a model up, run passes of all sorts, and return what is new in them."""
    runner = ModelRunner(
        folder=folder,
        config=load_config(folder),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        num_blocks=BLOCKS,
        block_size=BLOCK,
    )
    engine.runner.__dict__["has_forms"] = lambda device: all_forms
    with noted() as found:
        runner.warm_up()
        before = set(found)
        rng = random.Random(0)
        for _ in range(40):
            passes(runner, rng)
    assert before
    return sorted(f"{name} {form}" for name, form in found - before)


def main(folder: Path) -> None:
    """Print what passes meet after a warm-up with typical sizes, and after one with all forms."""
    kernels._KERNELS["cpu"] = kernels._KERNELS["cuda"]
    # Of an H200, so that long sequences are split.
    for kernel in (decode, latent):
        kernel.__dict__["multiprocessors"] = lambda device: 132
    print(json.dumps([new_forms(folder, all_forms=all_forms) for all_forms in (False, True)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
