"""`twinpool plan`: which layouts fit, and how to split devices between prefill and decode.

Owns flags and printing; the planning is `planner`'s.
"""

import json
import re
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.table import Table

from launch.console import table_console
from planner.calibration import Calibration, assumed, read_calibration
from planner.errors import PlannerError
from planner.hardware import find_device
from planner.models import find_model
from planner.options import GIB, Option, Question
from planner.pools import Slo
from planner.report import command, figures, outcome_lines, question_lines, why_lost
from planner.search import Plan
from planner.search import plan as make_plan
from planner.traces import read_trace
from planner.workload import Workload, of_trace, steady

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}


def _duration(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s|)", text)
    if match is None or not float(match[1]):
        raise typer.BadParameter(f"{text!r} is no time above 0; write 500ms or 0.5s")
    return float(match[1]) * _UNITS_S[match[2]]


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A config.json, a folder that has one, or a published model's name.",
        ),
    ],
    gpu: Annotated[str, typer.Option(help="Kind of device, as h100.")],
    gpus: Annotated[int, typer.Option(min=2, max=512, help="Devices for both pools.")],
    ttft: Annotated[
        float, typer.Option(parser=_duration, metavar="TIME", help="Limit, as 500ms or 2s.")
    ],
    tpot: Annotated[float, typer.Option(parser=_duration, metavar="TIME", help="Limit, as 50ms.")],
    trace: Annotated[
        Path | None, typer.Option(help="Azure's CSV or Mooncake's JSONL; may be gzipped.")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="In place of a trace.")] = None,
    output_tokens: Annotated[int | None, typer.Option(min=1, help="In place of a trace.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second; a trace's own unless given.")
    ] = None,
    gap_cv: Annotated[
        float | None,
        typer.Option(
            help="How uneven arrivals are, in place of the trace's own; 1 is at random.",
        ),
    ] = None,
    attainment: Annotated[
        float, typer.Option(help="Share of requests that must keep both limits.")
    ] = 0.9,
    reserve: Annotated[float, typer.Option(help="Share of memory that stays free.")] = 0.1,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Sequences of a decode step, times dp.")
    ] = 256,
    max_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens of a pass, times cp.")
    ] = 2048,
    weight_bits: Annotated[
        float | None, typer.Option(help="Of a weight; the model's own unless given.")
    ] = None,
    kv_bits: Annotated[
        float | None, typer.Option(help="Of an element of KV; the model's own unless given.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="A measured calibration: a file, or a shipped one's name.")
    ] = None,
    losers: Annotated[
        int, typer.Option(min=0, help="Layouts of each pool that are shown beside the best.")
    ] = 8,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures to this file.")
    ] = None,
) -> None:
    """Find the layouts that fit, and the split of devices that serves most within the limits."""
    try:
        _check("--attainment", attainment, below=1)
        _check("--reserve", reserve, below=1, zero=True)
        _check("--rate", rate)
        _check("--gap-cv", gap_cv, zero=True)
        _check("--weight-bits", weight_bits)
        _check("--kv-bits", kv_bits)
        shape = find_model(model, weight_bits, kv_bits)
        device = find_device(gpu)
        outcome = make_plan(
            Question(
                shape=shape,
                device=device,
                devices=gpus,
                workload=_workload(trace, prompt_tokens, output_tokens, rate, gap_cv),
                slo=Slo(ttft_s=ttft, tpot_s=tpot, attainment=attainment),
                calibration=_calibration(calibration, device.name, shape.name),
                reserve=reserve,
                pass_tokens=max_batched_tokens,
                max_batch=max_batch,
            )
        )
    except PlannerError as exc:
        _fail(str(exc))
    if json_file is not None:
        _write(json_file, outcome)
    _show(outcome, model, losers)


def _check(flag: str, value: float | None, below: float = float("inf"), zero: bool = False) -> None:
    if value is None or 0 < value < below or (zero and value == 0):
        return
    least = "0 or more" if zero else "above 0"
    most = "" if below == float("inf") else f" and below {below:g}"
    _fail(f"{flag} is {value:g}; it must be {least}{most}")


def _calibration(name: str | None, gpu: str, model: str) -> Calibration:
    return assumed(gpu) if name is None else read_calibration(name, gpu, model)


def _workload(
    trace: Path | None,
    prompt_tokens: int | None,
    output_tokens: int | None,
    rate: float | None,
    gap_cv: float | None,
) -> Workload:
    if trace is not None:
        if prompt_tokens is not None or output_tokens is not None:
            _fail(
                "--trace says how long requests are; leave out --prompt-tokens and --output-tokens"
            )
        return of_trace(read_trace(trace), rate, None if gap_cv is None else gap_cv**2)
    if prompt_tokens is None or output_tokens is None or rate is None:
        _fail("give --trace FILE, or all of --prompt-tokens, --output-tokens and --rate")
    return steady(prompt_tokens, output_tokens, rate, 1.0 if gap_cv is None else gap_cv**2)


def _show(outcome: Plan, model: str, losers: int) -> None:
    for line in question_lines(outcome):
        typer.echo(line)
    console = table_console()
    console.print(_best_table(outcome))
    for line in outcome_lines(outcome):
        typer.echo(line)
    runnable = (
        (outcome.best.prefill, outcome.best.decode) if outcome.question.shape.runs_here else ()
    )
    for instances in runnable:
        folder = model if Path(model).exists() else f"path/to/{model}"
        typer.echo(f"  {command(outcome.question, instances.option, folder)}")
    if losers:
        console.print(_losers_table(outcome, losers))


def _best_table(outcome: Plan) -> Table:
    table = Table()
    for column in ("pool", "instances", "layout", "devices", "weights", "activations", "reserve"):
        table.add_column(column, justify="left" if column in ("pool", "layout") else "right")
    table.add_column("KV a device", justify="right")
    table.add_column("KV an instance", justify="right")
    for instances in (outcome.best.prefill, outcome.best.decode):
        option = instances.option
        held = option.memory
        table.add_row(
            option.role.value,
            str(instances.count),
            option.layout.name,
            str(instances.devices),
            *(f"{part / GIB:.1f} GiB" for part in (held.weights, held.activations, held.reserve)),
            f"{held.kv / GIB:.1f} GiB",
            _kv(option),
        )
    return table


def _kv(option: Option) -> str:
    if not option.fits:
        return "-"
    total = option.memory.kv * option.layout.ranks
    return f"{option.kv_tokens:,} tokens, {total / GIB:.1f} GiB"


def _losers_table(outcome: Plan, most: int) -> Table:
    """Show what fits first, best first, then what does not."""

    def order(option: Option) -> tuple[bool, bool, float]:
        own = outcome.best_with.get((option.role, option.layout))
        return own is None, not option.fits, 0.0 if own is None else -own.goodput_per_device

    table = Table(title="other layouts", title_justify="left")
    for column in ("pool", "layout", "KV an instance", "why not"):
        table.add_column(column, justify="right" if column.startswith("KV") else "left")
    left_out = 0
    for role in dict.fromkeys(option.role for option in outcome.losers):
        ordered = sorted((loser for loser in outcome.losers if loser.role is role), key=order)
        left_out += len(ordered[most:])
        for loser in ordered[:most]:
            table.add_row(role.value, loser.layout.name, _kv(loser), why_lost(outcome, loser))
    if left_out:
        table.caption = f"{left_out} more: --losers N shows N of each pool, --json all"
    return table


def _write(path: Path, outcome: Plan) -> None:
    try:
        path.write_text(json.dumps(figures(outcome), indent=1) + "\n", encoding="utf-8")
    except OSError as exc:
        _fail(f"--json: cannot write {path}: {exc.strerror}")


def _fail(message: str) -> NoReturn:
    typer.echo(f"twinpool: {message}", err=True)
    raise typer.Exit(2)
