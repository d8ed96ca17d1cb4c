"""How fast is prefill, beside two peers and the matrix products that it cannot do without?

Random prompts, the same for all, in bf16: prompt tokens per second until each prompt has its first
token. Every way is a process with all cores and as many threads; they take turns, round by round,
and those whose turn it is not are stopped. The first round of each is not counted.

- Ours: the engine alone, in chunks of the budget that prefill serves with, greedily sampled.
- transformers: one forward for all prompts, with its defaults on a CPU.
- vLLM: its CPU build, offline, without prefix caching; with --vllm-python alone.
- Served: the whole system and vLLM's server, each from its client: one token for every prompt. Ours
  goes on between its turns, idle; the others' processes are stopped.
- Limit: the products of a pass alone, of the same shapes, in the fastest of torch's own ways, as
  if nothing else were to be done. Attention's are those of plain slices: a kernel that keeps its
  scores in the cache may come to more.
- Attention: one layer's alone, ours beside torch's SDPA.
- Peak memory: resident, weights and caches included. Our cache has room for the longest prompt,
  vLLM's is 2 GiB, which it needs not use.
- Ring: two context-parallel ranks of a thread each, over gloo on loopback, beside one rank of two
  threads; what they send beside the formula of engine.ring.choose, and how much of the time that
  the same messages take alone they did not stand still for. Standing still for the other rank's
  compute counts as well, so that the share may be below zero.
- Ring, after a cached prefix: pass-KV's time beside pass-Q's, and from how many new tokens on
  pass-KV is no slower, beside where engine.ring.choose takes it.
- Layout: two ranks of a thread each with tp or pp, beside one rank of two threads; and tp with the
  residual stream by rows (sequence parallelism) beside plain tp.

    python -m bench.prefill --checkpoints DIR --vllm-python PEER/bin/python --json FILE
    python -m bench.prefill --checkpoints DIR --rows 'dense, 2,048'
    python -m bench.prefill --checkpoints DIR --rows ring
    python -m bench.prefill --device cuda --json FILE

On a GPU: prompts of models that fit it, beside transformers on the same one and beside their
products at the rate of a large one.
"""

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bench import checkpoints as models
from bench.gpus import device as devices
from bench.gpus import models as gpu_models
from bench.gpus.device import Device
from bench.options import Checkpoints, Json, Quick, Rows, VllmPython
from bench.prefills import layout_pair, prompts, ring_pair
from bench.prefills.settings import Settings
from bench.report import GrowingReport, Row, report
from bench.sides.process import SideFailed

QUESTION = "How fast is prefill, beside two peers and its matrix products alone?"
# Of the formula; the logits of a prompt's last token travel too.
_BYTES_OFF = 0.02


def _measure(settings: Settings) -> list[Row]:
    """Measure what the pattern matches; ends the program where a way fails."""

    def say(line: str) -> None:
        typer.echo(line, err=True)

    rows: list[Row] = []
    try:
        for model in (models.DENSE, models.MOE):
            rows += prompts.of_model(model, settings, say)
            rows += prompts.of_served(model, settings, say)
        # Beside transformers alone, which takes a minute and more for longer ones.
        latents = replace(settings, vllm_python=None, longest=2048)
        rows += prompts.of_model(models.LATENT, latents, say)
        rows += prompts.of_attention(models.DENSE, settings, say)
        rows += ring_pair.speeds(settings, say)
        rows += ring_pair.variants(settings, say)
        rows += layout_pair.speeds(settings, say)
    except SideFailed as exc:
        say(str(exc))
        raise typer.Exit(1) from exc
    return rows


def _show_bytes(rows: list[Row]) -> None:
    for row in rows:
        if row.row.endswith("bytes sent") and row.limit:
            off = row.ours / row.limit - 1
            met = "met" if abs(off) <= _BYTES_OFF else "MISSED"
            typer.echo(f"{row.row}: {100 * off:+.2f}% of the formula, wanted within 2%: {met}")


def main(
    json: Json = None,
    rows: Rows = "",
    rounds: Annotated[
        int, typer.Option(min=2, help="Rounds counted of each row; half for 32,768 tokens.")
    ] = 5,
    vllm_python: VllmPython = None,
    checkpoints: Checkpoints = None,
    quick: Quick = False,
    device: Device = "cpu",
) -> None:
    """Measure prefill beside transformers, vLLM and the matrix products alone."""
    if device != "cpu":
        prompts_of = gpu_models.PROMPTS[:1] if quick else gpu_models.PROMPTS
        figures = GrowingReport(QUESTION, json)
        on = devices.found(device)
        gpu_models.measure(on, rows, figures, prompts=prompts_of, repeats=max(4, rounds))
        figures.end()
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
    _show_bytes(measured)


if __name__ == "__main__":
    typer.run(main)
