"""How fast does decode give tokens, beside vLLM, transformers and the memory's own limit?

Random prompts, the same for all, in bf16, greedily sampled, to a given length: tokens per second of
the whole batch. Every way is a process with all cores and as many threads; they take turns, round
by round, and those whose turn it is not are stopped. The first round of each is not counted.

A round's speed is that of its median step, from the first step that gives every sequence a token
on: computing the prompts is no part of it, for nobody.

- Ours: a decode instance without its network: engine, admission, scheduler and step loop. Its
  cache holds random numbers instead of prompts' keys and values.
- vLLM: its CPU build, offline `LLM.generate`, without prefix caching; with --vllm-python alone. Its
  DecodeBenchConnector fills its cache with random numbers too; the clock is read whenever its
  engine's core gives tokens.
- transformers: its own generate; for few short prompts, since it has to compute them.
- Limit: the bytes that a step must read, at the rate at which as many threads read 512 MiB that
  were written before, measured in each round. Weights count once, of experts those alone that some
  token of the batch has chosen, which is counted in the round that is not timed; keys and values
  count once for each sequence.
- Served: the whole system and vLLM's server, each from its client: tokens that arrive while all
  sequences of the batch get some. Both have cached the prompts in the round that is not counted.
  Ours has as many threads as there are cores in each of its instances.
- Overhead: the time of our step that is not the model's: what is decided, prepared, sampled and
  handed out, in ms.
- Inter-token latency: at the client, while requests come at random times, one in a second, whether
  or not earlier ones have ended; prompts of 256 tokens, answers of 32 to 96. Ours as a user starts
  it: half of the cores for each instance. Half as many rounds.
- Balance: how far the hottest of 8 ranks is above the mean where made-up skewed tokens go to
  experts that have been placed by the window before, beside the even places; and how long a step
  waits while all of a rank's experts of a layer are exchanged.

    python -m bench.decode --checkpoints DIR --vllm-python PEER/bin/python --json FILE
    python -m bench.decode --checkpoints DIR --rows 'dense, batch 16'
    python -m bench.decode --checkpoints DIR --rows 'overhead|latency'
    python -m bench.decode --device cuda --json FILE

On a GPU: whole steps of models that fit it, played from CUDA graphs, beside what their weights and
keys take at the rate of a copy; and the tokens of batches beside transformers with its continuous
batching.
"""

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bench import checkpoints as models
from bench.decodes import balance, batches, served
from bench.decodes.settings import Settings
from bench.gpus import device as devices
from bench.gpus import models as gpu_models
from bench.gpus import steps as gpu_steps
from bench.gpus.device import Device
from bench.options import Checkpoints, Json, Quick, Rows, VllmPython
from bench.report import GrowingReport, Row, report
from bench.sides.process import SideFailed

QUESTION = "How fast does decode give tokens, beside vLLM, transformers and the memory's limit?"
# Of a GPU's step in a round, which takes milliseconds.
_CALLS = 6
# By what a row's name has in it: at most so much is wanted.
_TARGETS = {"overhead": 1.0, "p99/p50": 1.5}


def _measure(settings: Settings) -> list[Row]:
    """Measure what the pattern matches; ends the program where a way fails."""

    def say(line: str) -> None:
        typer.echo(line, err=True)

    rows: list[Row] = []
    try:
        for model in (models.DENSE, models.MOE):
            rows += batches.of_model(model, settings, say)
            rows += batches.of_overhead(model, settings, say)
            rows += served.of_batches(model, settings, say)
            rows += served.of_load(model, settings, say)
        # Beside transformers alone.
        rows += batches.of_model(models.LATENT, replace(settings, vllm_python=None), say)
        rows += balance.rows(settings, say)
    except SideFailed as exc:
        say(str(exc))
        raise typer.Exit(1) from exc
    return rows


def _on_gpu(name: str, pattern: str, rounds: int, figures: GrowingReport, *, quick: bool) -> None:
    device = devices.found(name)
    batches = gpu_models.BATCHES[:1] if quick else gpu_models.BATCHES
    gpu_steps.measure(device, pattern, _CALLS * rounds, figures, quick=quick)
    gpu_models.measure(device, pattern, figures, batches=batches)
    figures.end()


def _show_targets(rows: list[Row]) -> None:
    for row in rows:
        for part, most in _TARGETS.items():
            if part in row.row:
                met = "met" if row.ours <= most else "MISSED"
                typer.echo(f"{row.row}: {row.ours:.2f}, wanted at most {most:g} {row.unit}: {met}")


def main(
    json: Json = None,
    rows: Rows = "",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds counted of each row.")] = 5,
    vllm_python: VllmPython = None,
    checkpoints: Checkpoints = None,
    quick: Quick = False,
    device: Device = "cpu",
) -> None:
    """Measure decode beside vLLM, transformers and reading memory alone."""
    if device != "cpu":
        _on_gpu(device, rows, rounds, GrowingReport(QUESTION, json), quick=quick)
        return
    with ExitStack() as stack:
        if checkpoints is None:
            checkpoints = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = Settings(
            checkpoints=checkpoints,
            pattern=rows,
            rounds=rounds,
            vllm_python=vllm_python,
            quick=quick,
        )
        measured = _measure(settings)
    report(QUESTION, measured, json)
    _show_targets(measured)


if __name__ == "__main__":
    typer.run(main)
