"""How many requests a second does a server answer within their limits?

Sends requests when they are due, whatever becomes of those before (open loop), to a Twinpool router
or to any server that speaks OpenAI's completions. Figures are those of `vllm bench serve`; beside
them stands the attainment: of all requests that were submitted, refused and failed ones too, how
many kept their limits.

- --rate R (or a trace's own) is one run; --rates 1,2,4 are several, with curves
- --search finds the highest rate of which at least --attainment of the requests keep their limits
- in the folder --out: records.jsonl, a line for each request as it ends; figures.json; drawings as
  PNG and SVG; report.html, which needs no other file

    python -m bench.goodput --rate 2 --ttft 500ms --tpot 50ms
    python -m bench.goodput --workload azure-code --traces FOLDER --length-scale 0.1 --search \\
        --ttft 500ms --tpot 50ms
    python -m bench.goodput --backend openai --url http://127.0.0.1:8000 --trace FILE.jsonl
"""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import typer
import uvloop

from bench.goodputs import findings, plots
from bench.goodputs.backend import Backend, SendError, Served
from bench.goodputs.config import GoodputConfig
from bench.goodputs.findings import Findings
from bench.goodputs.load import ServerLost
from bench.goodputs.progress import Progress
from bench.goodputs.records import Record, RecordFile
from bench.goodputs.runner import Asked, Runner
from bench.workloads.arrivals import WorkloadError
from service.config import launcher
from service.errors import StartError
from service.garbage import collect_rarely

_DESCRIBE_S = 30.0
_STOPPED = 130


async def measure(asked: Asked, found: Findings) -> None:
    """Do all runs; what comes of them is in `found`, also where this ends early.

    Raises SendError where the first request fails, ServerLost, WorkloadError, and ValueError for
    what no connection can be made with.
    """
    config = found.config
    with RecordFile(found.folder / findings.RECORDS) as file, Progress(config.limits) as progress:
        backend = config.open_backend()
        try:
            found.served = await _described(backend)

            def note(record: Record) -> None:
                file.write(record)
                progress.ended(record)

            runner = Runner(backend, found.served, asked, begin=progress.begin, note=note)
            found.runs = runner.runs
            await _runs(runner, found, progress)
        finally:
            await backend.close()


async def _runs(runner: Runner, found: Findings, progress: Progress) -> None:
    config = found.config
    for wanted in config.rates:
        runner.plan(wanted)  # rather than that the last one fails after an hour
    found.alone = await runner.check(config.first_rate)
    collect_rarely()  # or its own pauses would be the server's
    found.search = config.open_search()
    if found.search is not None:
        await runner.search(found.search, progress.say)
        return
    for rate in config.rates or (config.rate,):
        progress.say(findings.line(await runner.at(rate)))


async def _described(backend: Backend) -> Served:
    try:
        async with asyncio.timeout(_DESCRIBE_S):
            return await backend.describe()
    except TimeoutError as exc:
        raise SendError("timeout", f"the server says nothing for {_DESCRIBE_S:g} s") from exc


def start(config: GoodputConfig) -> None:
    """Measure, and keep what there is; raises StartError where it fails."""
    if config.plots and (missing := plots.missing()):
        raise StartError(missing)
    try:
        asked = _asked(config)
        found = Findings(config=config, folder=_folder(config))
    except (WorkloadError, OSError) as exc:
        raise StartError(str(exc)) from exc
    code = _measured(asked, found)
    if found.runs:
        found.keep()
        for warning in found.warned:
            typer.echo(f"warning: {warning}", err=True)
        if found.search is not None:
            typer.echo(found.verdict()[0])
        typer.echo(f"all of it is in {found.folder}", err=True)
    if code == _STOPPED:
        raise typer.Exit(code)
    if found.failure:
        raise StartError(found.failure)
    if found.is_none_enough:
        raise typer.Exit(1)


def _measured(asked: Asked, found: Findings) -> int:
    """Measure and return the exit code; why it failed, if it did, is in `found`."""
    try:
        uvloop.run(measure(asked, found))
    except KeyboardInterrupt:
        found.failure = "stopped before the end"
        return _STOPPED
    except (SendError, ServerLost, WorkloadError, ValueError, OSError) as exc:
        found.failure = str(exc)
        return 1
    return 0


def _asked(config: GoodputConfig) -> Asked:
    return Asked(
        workload=config.open_workload(),
        phases=config.phases,
        slo=config.limits,
        seed=config.seed,
        vocab_size=config.vocab_size,
        max_context=config.max_context,
        max_requests=config.max_requests,
        timeout_s=config.timeout,
    )


def _folder(config: GoodputConfig) -> Path:
    """Make the folder to write to, which must be new: records are not to be lost."""
    folder = config.out or Path(f"goodput-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OSError(f"--out: {folder} is there already; name a new folder")
    file = config.json_file
    if file is not None and not file.parent.is_dir():
        raise OSError(f"--json: there is no folder {file.parent}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


app = launcher(
    "goodput",
    GoodputConfig,
    start,
    help="Measure how many requests a second a server answers within their limits.",
)

if __name__ == "__main__":
    app()
