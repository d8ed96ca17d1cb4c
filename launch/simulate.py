"""`twinpool simulate`: what chosen pools would do with a load.

Owns running and printing; flags are `launch.simulation`'s, the simulation `planner.simulator`'s.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from launch.console import table_console
from launch.simulation import SimulationConfig
from planner.errors import PlannerError
from planner.pools import Slo
from planner.simulator.arrivals import at_rate, rate_of
from planner.simulator.cluster import Simulation
from planner.simulator.outcome import Outcome, highest_rate, outcome
from planner.simulator.setup import Setup
from planner.traces import Request
from service.config import launcher
from service.errors import StartError
from service.garbage import collect_rarely

_SHOWN = (50, 90, 99)


def start(config: SimulationConfig) -> None:
    """Simulate, and say what came out; raises StartError where it cannot be."""
    try:
        setup, load, devices = config.setup(), config.load(), config.devices
    except PlannerError as exc:
        raise StartError(str(exc)) from exc
    collect_rarely()  # there may be a million requests, looked through each time
    began_s = time.perf_counter()
    found, best = _simulated(config, setup, load)
    seconds = time.perf_counter() - began_s
    table_console().print(_table(found))
    if config.search:
        typer.echo(_verdict(best, config.limits, devices))
    submitted = sum(each.submitted for each in found)
    typer.echo(f"simulated {submitted:,} requests in {seconds:.1f} s", err=True)
    if config.json_file is not None:
        _write(config.json_file, _figures(config, found, best, devices))


def _simulated(
    config: SimulationConfig, setup: Setup, load: list[Request]
) -> tuple[list[Outcome], float | None]:
    """Return the figures of all rates that were run, and the best rate where one was looked for."""
    found: dict[float, Outcome] = {}

    def attains(rate: float) -> bool:
        if rate not in found:
            calls = Simulation(setup).run(at_rate(load, rate))
            found[rate] = outcome(calls, config.limits, rate)
        return found[rate].attainment >= config.attainment

    rates = config.rates or (rate_of(load),)
    best = highest_rate(attains, start=rates[0]) if config.search else None
    for rate in () if config.search else rates:
        attains(rate)
    return [found[rate] for rate in sorted(found)], best


def _table(found: list[Outcome]) -> Table:
    table = Table()
    for column in ("requests/s", "attained", "goodput", "finished", "refused"):
        table.add_column(column, justify="right")
    for time_of in ("TTFT", "TPOT"):
        for percentile in _SHOWN:
            table.add_column(f"{time_of} p{percentile}", justify="right")
    for each in found:
        table.add_row(
            f"{each.rate_per_s:.4g}",
            f"{each.attainment:.1%}",
            f"{each.goodput:.4g}",
            f"{each.finished:,}",
            f"{each.submitted - each.finished:,}",
            *_times(each),
        )
    return table


def _times(found: Outcome) -> Iterator[str]:
    for times_s in (found.ttft_s, found.tpot_s):
        for percentile in _SHOWN:
            yield f"{times_s[percentile] * 1e3:,.1f} ms" if times_s else "-"


def _verdict(best: float | None, slo: Slo, devices: int) -> str:
    limits = f"TTFT {slo.ttft_s * 1e3:g} ms and TPOT {slo.tpot_s * 1e3:g} ms"
    if best is None:
        return f"at no rate do {slo.attainment:.0%} keep {limits}"
    return (
        f"{slo.attainment:.0%} keep {limits} up to {best:.3g} requests/s, {best / devices:.3g} a "
        f"device of {devices}"
    )


def _figures(
    config: SimulationConfig, found: list[Outcome], best: float | None, devices: int
) -> dict[str, Any]:
    return {
        "settings": config.model_dump(mode="json", exclude={"json_file"}),
        "devices": devices,
        "best_requests_per_s": best,
        "rates": [asdict(each) for each in found],
    }


def _write(path: Path, figures: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as exc:
        raise StartError(f"--json: cannot write {path}: {exc.strerror}") from exc


app = launcher(
    "simulate",
    SimulationConfig,
    start,
    help="Run a load through pools on a virtual clock, with the router's and schedulers' own code.",
)
