"""Which system answers more requests within their limits on this machine?

Starts one system after another with the same checkpoint and the same cores, and has each asked by
`python -m bench.goodput`, with the options after `--`:

- twinpool: `twinpool serve`, a prefill and a decode instance, each with half of the cores
- vllm: vLLM with both in one instance, on all cores

Each has a folder of its own in --out, with records, curves and report.

    python -m bench.goodput_systems --checkpoints DIR --vllm-python PYTHON --out DIR \\
        -- --search --ttft 2s --tpot 200ms --prompt-tokens 128 --output-tokens 32
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from json import loads
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.checkpoints import DENSE, add_tokenizer, kept
from bench.goodputs import plots, records
from bench.goodputs.config import GoodputConfig
from bench.goodputs.findings import FIGURES, RECORDS, SETTINGS
from bench.goodputs.systems import SYSTEMS, TWINPOOL, VLLM, Machine
from bench.options import Json, VllmPython
from bench.report import Row, report

QUESTION = "Which system answers more requests within their limits on this machine?"


def beside(found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Return the first system's figures with another's of the same name beside each of them."""
    (_, ours), *others = found.items()
    rows = []
    for row in ours:
        plain = Row(**row)
        matches = [
            Row(**{**row, "peer": each["ours"], "peer_name": name})
            for name, theirs in others
            for each in theirs
            if each["row"] == row["row"]
        ]
        rows += matches or [plain]
    return rows


def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(file_okay=False, help="New folder for what comes out.")],
    checkpoints: Annotated[
        Path, typer.Option(file_okay=False, help="Keep the checkpoint here; made if it is not.")
    ],
    json: Json = None,
    system: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SYSTEMS)}.")] = None,
    vllm_python: VllmPython = None,
    max_context: Annotated[int, typer.Option(min=2, help="Longest request, in tokens.")] = 2048,
    kv_gib: Annotated[int, typer.Option(min=1, help="For KV, of a system in all.")] = 2,
) -> None:
    """Measure systems one after another; what stands after -- are the benchmark's options."""
    names = system or [TWINPOOL, *([VLLM] if vllm_python else [])]
    if unknown := [name for name in names if name not in SYSTEMS]:
        raise typer.BadParameter(f"there is no system {unknown[0]!r}", param_hint="--system")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        add_tokenizer(kept(checkpoints, DENSE), Path(folder))
        machine = Machine(
            model=Path(folder),
            max_context=max_context,
            kv_gib=kv_gib,
            cores=tuple(sorted(os.sched_getaffinity(0))),
            vllm_python=vllm_python,
        )
        found = {name: _measured(name, machine, out / name, context.args) for name in names}
    report(QUESTION, beside(found), json)
    if not plots.missing():
        _compare(out, names)


def _compare(out: Path, names: Sequence[str]) -> None:
    """Draw all systems' curves in one figure."""
    config = GoodputConfig.model_validate_json((out / names[0] / SETTINGS).read_text())
    of_systems = {name: records.read(out / name / RECORDS) for name in names}
    drawn = plots.compare(of_systems, config.limits, config.attainment)
    plots.save(drawn, out, "attainment-by-rate")


def _measured(name: str, machine: Machine, out: Path, options: list[str]) -> list[dict[str, Any]]:
    typer.echo(f"starting {name}", err=True)
    try:
        with SYSTEMS[name](machine) as where:
            return _asked((*where, "--max-context", str(machine.max_context), *options), out)
    except RuntimeError as exc:
        typer.echo(f"{name}: {exc}", err=True)
        raise typer.Exit(1) from exc


def _asked(options: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Run the benchmark and return its rows.

    Raises RuntimeError where it has kept none: what went wrong it has said itself.
    """
    command = [sys.executable, "-m", "bench.goodput", *options, "--out", str(out)]
    subprocess.run(command, check=False, stdout=sys.__stderr__)
    figures = out / FIGURES
    if not figures.exists():
        raise RuntimeError("the benchmark has no figures of it")
    rows: list[dict[str, Any]] = loads(figures.read_text())["rows"]
    return rows


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(context_settings={"allow_extra_args": True})(main)

if __name__ == "__main__":
    app()
