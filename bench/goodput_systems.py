"""Which system answers more requests within their limits on this machine?

Starts one system after another, with the same checkpoint of random weights in bf16, the same cores,
as much memory for KV and no prefix cache, and searches the highest rate of which 90% of the
requests keep their limits, for two loads with two pairs of limits each:

- chat: the lengths of Azure's conversations, made short
- code: those of Azure's code completions: long prompts, short answers

1P1D is a prefill and a decode instance, colocated one that does both; two instances have half of
the cores each. vLLM's pair hands KV over by NIXL and is asked in two steps, as its own proxies do;
its two instances are asked in turn. Each is also asked for single requests, with nothing beside
them: TTFT, TPOT, and the hand-over, from prefill's end, as the client learns of it, to the first
token of decode.

With --device cuda Twinpool's systems are on one GPU, of whose memory each instance has its part;
vLLM's rows are of its CPU build and are left out. With --no-host-copy KV goes from cache to cache.

Runs are short, so that all systems are done within half an hour: give a longer --duration-s and
--budget-s for figures to publish.

    python -m bench.goodput_systems --traces DIR --checkpoints DIR \\
        --vllm-python PEER/bin/python --json FILE
    python -m bench.goodput_systems --traces DIR --rows 'chat, Twinpool'
    python -m bench.goodput_systems --traces DIR --vllm-python PEER/bin/python --rows alone
    python -m bench.goodput_systems --traces DIR --device cuda --large --lengths 128,4096,32768 \\
        --max-context 40960 --kv-gib 16
"""

import os
import signal
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from bench import checkpoints as models
from bench import report
from bench.goodputs import plots, records
from bench.goodputs.alone import NEW_TOKENS
from bench.goodputs.contest import Contest, beside
from bench.goodputs.figures import Settings
from bench.goodputs.loads import Load, loads
from bench.goodputs.search import Wanted
from bench.goodputs.systems import Machine
from bench.options import Checkpoints, Json, Quick, Rows, VllmPython
from bench.workloads import traces as public
from bench.workloads.arrivals import Phases, WorkloadError
from bench.workloads.workload import Repaced

QUESTION = "Which system answers more requests within their limits on this machine?"
_QUICK = Phases(warmup_s=0.5, window_s=3.0)

Traces = Annotated[Path, typer.Option(file_okay=False, help="Folder of the public traces' files.")]


def main(
    traces: Traces,
    json: Json = None,
    rows: Rows = "",
    vllm_python: VllmPython = None,
    checkpoints: Checkpoints = None,
    quick: Quick = False,
    sparse: Annotated[bool, typer.Option(help="The sparse checkpoint, not the dense one.")] = False,
    large: Annotated[bool, typer.Option(help="One in the shape of Llama-3-8B, for a GPU.")] = False,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the models run.")] = "cpu",
    host_copy: Annotated[
        bool, typer.Option(help="A GPU's KV by the host's memory, not from cache to cache.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Keep records, logs and drawings here.")
    ] = None,
    budget_s: Annotated[
        float, typer.Option(min=0, help="Of a system under a load: no run begins after it.")
    ] = 80.0,
    duration_s: Annotated[float, typer.Option(min=0.1, help="Of a run's window.")] = 14.0,
    warmup_s: Annotated[float, typer.Option(min=0, help="Before each window.")] = 2.0,
    precision: Annotated[float, typer.Option(min=0.01, help="Of a rate, as a part of it.")] = 0.15,
    repeats: Annotated[int, typer.Option(min=2, help="Requests alone of each length.")] = 10,
    lengths: Annotated[str, typer.Option(help="Tokens of prompts that are asked alone.")] = (
        "128,512,2000"
    ),
    chat_scale: Annotated[float, typer.Option(min=0.001, help="Of chat's lengths.")] = 0.4,
    code_scale: Annotated[float, typer.Option(min=0.001, help="Of code's lengths.")] = 0.3,
    slo_scale: Annotated[float, typer.Option(min=0.001, help="Of all limits.")] = 1.0,
    max_context: Annotated[int, typer.Option(min=2048, help="Longest request, in tokens.")] = 4096,
    kv_gib: Annotated[int, typer.Option(min=2, help="For KV, of a system in all.")] = 2,
) -> None:
    """Measure systems one after another, side by side."""
    if out is not None and out.exists() and any(out.iterdir()):
        raise typer.BadParameter(f"{out} is there already; name a new one", param_hint="--out")
    if json is not None and not json.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {json.parent}", param_hint="--json")
    alone = _lengths(lengths, max_context)
    settings = Settings(
        pattern=rows,
        phases=_QUICK if quick else Phases(warmup_s=warmup_s, window_s=duration_s),
        budget_s=0.0 if quick else budget_s,
        wanted=Wanted(runs=1, precision=precision),
        max_context=max_context,
        lengths=alone[:1] if quick else alone,
        repeats=2 if quick else repeats,
    )
    asked = loads(chat_scale=chat_scale, code_scale=code_scale, slo_scale=slo_scale)
    workloads = {load: _workload(load, traces) for load in asked}
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = temporary / "model"
        model.mkdir()
        name = models.LARGE if large else models.MOE if sparse else models.DENSE
        models.add_tokenizer(models.kept(checkpoints or temporary / "made", name), model)
        machine = Machine(
            model=model,
            max_context=max_context,
            kv_gib=kv_gib,
            cores=tuple(sorted(os.sched_getaffinity(0))),
            logs=temporary,
            vllm_python=vllm_python if device == "cpu" else None,
            device=device,
            host_copy=host_copy,
        )
        contest = Contest(machine, workloads, settings, out or temporary / "out", _say)
        try:
            contest.hold()
        finally:  # also where it is stopped
            _report(contest, json)
        if out is not None and not plots.missing():
            _compare(contest, asked, settings.wanted.attainment, out)
    if not contest.found:
        raise typer.BadParameter(
            "no system is left to be asked; see --help for what rows are, and give --vllm-python"
            " where they are vLLM's",
            param_hint="--rows",
        )
    if contest.failed:
        raise typer.Exit(1)


def _lengths(text: str, max_context: int) -> tuple[int, ...]:
    lengths = tuple(int(part) if part.strip().isdigit() else 0 for part in text.split(","))
    most = max_context - NEW_TOKENS
    if not all(0 < tokens <= most for tokens in lengths):
        raise typer.BadParameter(
            f"{text}: give numbers of tokens of 1 to {most}, which leave room for an answer within"
            " --max-context",
            param_hint="--lengths",
        )
    return lengths


def _workload(load: Load, folder: Path) -> Repaced:
    file, _ = public.NAMED[load.trace]
    try:
        requests = public.read(folder / file)
    except WorkloadError as exc:
        raise typer.BadParameter(str(exc), param_hint="--traces") from exc
    return Repaced(requests=requests, length_scale=load.length_scale, seed=0)


def _report(contest: Contest, json_file: Path | None) -> None:
    """Show the main figures; write these and what is known of each rate that was run."""
    main = beside({name: figures.main for name, figures in contest.found.items()})
    report.show(QUESTION, main)
    if json_file is not None:
        points = [row for figures in contest.found.values() for row in figures.points]
        report.write(QUESTION, [*main, *points], json_file)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _compare(contest: Contest, asked: Sequence[Load], attainment: float, out: Path) -> None:
    """Draw all systems' curves in one figure for each load and its limits."""
    for load in asked:
        files = {name: contest.records_of(name, load) for name in contest.found}
        of_systems = {name: records.read(file) for name, file in files.items() if file.exists()}
        for number, slo in enumerate(load.limits, start=1):
            if of_systems:
                drawn = plots.compare(of_systems, slo, attainment)
                plots.save(drawn, out, f"{load.name}-{number}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    # To end the systems in their own order, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    app()
