"""How close does moving KV come to UCX's own limit, to memcpy, and to NIXL?

Moves the same slices, scattered over pools two or four times as large, another random choice each
round, between a sender and a receiver on a core each, in every way that `bench.movers` has. One
way runs at a time, and the ways take turns; each starts cold: 64 MiB are written in both processes
before a round. Every byte is checked after every round, except in ucx_perftest, which sends one
hot buffer. The first rounds of each turn are not counted.

    python -m bench.transfer --peer-python PEER/bin/python --json FILE
    python -m bench.transfer --device cuda --json FILE

On a GPU: from one process's cache there to another's, beside a copy within the GPU and the copies
over the bus that are part of it.
"""

import itertools
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from bench.gpus import device as devices
from bench.gpus import transfer as gpu_transfer
from bench.gpus.device import Device
from bench.movers import figures
from bench.movers.figures import Figure, Measured
from bench.movers.memcpy import memcpy_s
from bench.movers.neighbours import Neighbours
from bench.movers.nixl import SETUP, nixl_s
from bench.movers.ours import Ours
from bench.movers.perftest import tag_bandwidth
from bench.movers.slices import message_a_slice_s
from bench.movers.targets import Verdict, verdicts
from bench.movers.works import CARRIERS, KIB, WORKS, Carrier, Work
from bench.report import GrowingReport, report
from bench.sides.process import SideFailed
from launch.console import table_console

QUESTION = "How close does moving KV come to UCX's own limit, to memcpy, and to NIXL?"
# In each turn; see perftest.
PERFTEST_RUNS = 4
# Where packing pays; for larger slices a message each is what every way sends.
_SMALL_SLICE_BYTES = 8 * KIB


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How often everything is run, and with which peer."""

    turns: int
    rounds: int
    peer_python: Path | None
    ours: Ours

    def measure(self, work: Work, carrier: Carrier) -> Measured:
        """Run every way of moving `work` over `carrier`; raises SideFailed."""
        perftest: list[float] = []
        kept: dict[str, list[float]] = defaultdict(list)
        # A move of 256 MiB is an average by itself, and a row must not take a minute.
        warm_up, rounds = (1, -(-self.rounds // 2)) if work.request else (2, self.rounds)
        for turn in range(self.turns):
            for _ in range(PERFTEST_RUNS):
                perftest.append(tag_bandwidth(figures.limit_message_bytes(work), carrier))
            first = turn * (warm_up + rounds)
            numbers = range(first, first + warm_up + rounds)
            for name, seconds in self._turn(work, carrier, numbers).items():
                kept[name] += seconds[warm_up:]
        found = {name: Figure.of_seconds(name, work, each) for name, each in kept.items()}
        return Measured(
            work=work,
            carrier=carrier,
            memcpy=found.pop("memcpy"),
            perftest=Figure(name="ucx_perftest", gbps=tuple(perftest)),
            slices=found.pop("a message a slice", None),
            ours={mode: found.pop(f"ours, {mode}") for mode in self.ours.modes(work)},
            peers=tuple(found.values()),
        )

    def _turn(self, work: Work, carrier: Carrier, numbers: range) -> dict[str, list[float]]:
        """Seconds of each round, by the way's name."""
        seconds = {"memcpy": memcpy_s(work, numbers)}
        if work.slice_bytes <= _SMALL_SLICE_BYTES:
            seconds["a message a slice"] = message_a_slice_s(work, carrier, numbers)
        for mode in self.ours.modes(work):
            seconds[f"ours, {mode}"] = self.ours.run(work, carrier, mode, numbers)
        if self.peer_python:
            seconds |= nixl_s(self.peer_python, work, carrier, numbers)
        return seconds


def _measured(bench: Bench, pattern: str) -> list[Measured]:
    """Measure what the pattern matches; ends the program where a way fails."""
    measured = []
    for work, carrier in itertools.product(WORKS, CARRIERS):
        name = figures.row_name(work, carrier)
        if not re.search(pattern, name):
            continue
        neighbours = Neighbours()
        try:
            measured.append(bench.measure(work, carrier))
        except SideFailed as exc:
            typer.echo(f"{name}: {exc}", err=True)
            raise typer.Exit(1) from exc
        # One busy neighbour makes UCX several times slower; whoever reads on must know.
        others = f"others took {neighbours.cores():.2f} cores meanwhile"
        typer.echo(f"measured {name}; {others}", err=True)
    return measured


def _show_ways(measured: list[Measured]) -> None:
    """Print every way's median and the distance of its quartiles; the report has the best only."""
    table = Table(title="GB/s of every way, median and quartile distance", title_justify="left")
    for column in ("row", "way", "GB/s", "spread"):
        table.add_column(column, justify="right" if column in ("GB/s", "spread") else "left")
    for one in measured:
        for index, figure in enumerate(one.every_way):
            name = "" if index else one.name
            table.add_row(name, figure.name, f"{figure.median:.2f}", f"{figure.spread:.2f}")
        table.add_section()
    table_console().print(table)


def _show_targets(found: list[Verdict]) -> None:
    table = Table(title="Targets", title_justify="left")
    for column in ("row", "against", "found", "wanted", ""):
        table.add_column(column, justify="right" if column in ("found", "wanted") else "left")
    for one in found:
        met = "met" if one.met else "MISSED"
        table.add_row(one.row, one.against, f"{one.ratio:.2f}x", one.wanted, met)
    table_console().print(table)


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    rows: Annotated[str, typer.Option(help="Only rows that this pattern matches.")] = "",
    peer_python: Annotated[
        Path | None,
        typer.Option(
            envvar="TWINPOOL_PEER_PYTHON",
            exists=True,
            dir_okay=False,
            help="Interpreter of an environment with NIXL; without one the peer is left out.",
        ),
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="How often each way has its turn.")] = 3,
    rounds: Annotated[
        int, typer.Option(min=2, help="Rounds counted in each turn; requests: half.")
    ] = 4,
    device: Device = "cpu",
) -> None:
    """Measure KV transfers beside UCX's limit, memcpy and NIXL."""
    if device != "cpu":
        gpu_figures = GrowingReport(QUESTION, json)
        gpu_transfer.measure(devices.found(device), rows, turns * rounds, gpu_figures)
        gpu_figures.end()
        return
    bench = Bench(turns=turns, rounds=rounds, peer_python=peer_python, ours=Ours())
    measured = _measured(bench, rows)
    _show_ways(measured)
    report(QUESTION, figures.rows(measured), json)
    _show_targets(verdicts(measured))
    if peer_python is None:
        typer.echo(SETUP)


if __name__ == "__main__":
    typer.run(main)
