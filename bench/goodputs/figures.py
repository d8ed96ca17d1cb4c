"""One system's figures under the loads that all systems get. Owns the order of what it is asked."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.goodputs import alone, rows
from bench.goodputs.backend import Backend
from bench.goodputs.joint import JointSearch
from bench.goodputs.loads import Load
from bench.goodputs.records import Record, RecordFile
from bench.goodputs.runner import Asked, Runner
from bench.goodputs.search import Search, Wanted
from bench.goodputs.systems import OpenBackend
from bench.report import Row
from bench.workloads.arrivals import Phases
from bench.workloads.prompts import Prompts
from bench.workloads.workload import Repaced

ALONE = "alone"
_LOWEST, _HIGHEST = 0.05, 100.0
# Long enough for the longest answer that keeps its limits.
_TIMEOUT_S = 90.0
_VOCAB_SIZE = 10_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How systems are asked.

    Attributes:
        pattern: What "chat, Twinpool 1P1D" and the like must match.
        phases: Of each run.
        budget_s: For all runs of a system under a load: none begins after it.
        lengths: Tokens of the prompts that are asked alone, `repeats` times each.
    """

    pattern: str
    phases: Phases
    budget_s: float
    wanted: Wanted
    max_context: int
    lengths: tuple[int, ...]
    repeats: int

    def wants(self, what: str, system: str) -> bool:
        """Whether a system is to be asked for something: a load's name or ALONE."""
        return re.search(self.pattern, f"{what}, {system}") is not None


@dataclass(kw_only=True)
class Figures:
    """Of one system: the main ones, and what is known of each rate that was run."""

    main: list[Row] = field(default_factory=list)
    points: list[Row] = field(default_factory=list)


async def timed_alone(
    open_backend: OpenBackend, settings: Settings, *, hands_over: bool
) -> list[Row]:
    """Time single requests of each length; raises SendError."""
    backend = open_backend()
    try:
        served = await backend.describe()
        vocab_size = served.vocab_size or _VOCAB_SIZE
        found = []
        for run, tokens in enumerate(settings.lengths):
            prompts = Prompts(seed=0, run=run, vocab_size=vocab_size)
            times = await alone.asked_alone(backend, prompts, tokens, settings.repeats)
            found += alone.rows(tokens, times, hands_over=hands_over)
        return found
    finally:
        await backend.close()


async def searched(
    open_backend: OpenBackend,
    load: Load,
    workload: Repaced,
    settings: Settings,
    kept: Path,
    say: Callable[[str], None],
) -> Figures:
    """Search the highest rate of each of a load's limits; records are kept in a file.

    Raises SendError where the first request fails, ServerLost and WorkloadError.
    """
    backend = open_backend()
    try:
        with RecordFile(kept) as file:
            runner = await _runner(backend, load, workload, settings, file.write)
            search = await _search(runner, load, settings, say)
    finally:
        await backend.close()
    return _figures(load, search)


async def _runner(
    backend: Backend,
    load: Load,
    workload: Repaced,
    settings: Settings,
    note: Callable[[Record], None],
) -> Runner:
    asked = Asked(
        workload=workload,
        phases=settings.phases,
        slo=load.limits[0],
        seed=0,
        vocab_size=_VOCAB_SIZE,
        max_context=settings.max_context,
        max_requests=None,
        timeout_s=_TIMEOUT_S,
    )
    runner = Runner(backend, await backend.describe(), asked, begin=lambda *_: None, note=note)
    await runner.check(load.start)
    return runner


async def _search(
    runner: Runner, load: Load, settings: Settings, say: Callable[[str], None]
) -> JointSearch:
    search = JointSearch(
        {
            slo: Search(settings.wanted, start=load.start, lowest=_LOWEST, highest=_HIGHEST)
            for slo in load.limits
        }
    )
    until_s = time.monotonic() + settings.budget_s
    while (rate := search.next()) is not None:
        records = (await runner.at(rate)).records
        search.add(rate, records)
        met = ", ".join(f"{sum(map(slo.met_by, records))} keep {slo}" for slo in load.limits)
        say(f"  {load.name}, {rate:g} requests/s: of {len(records)} {met}")
        if time.monotonic() > until_s:
            break
    return search


def _figures(load: Load, search: JointSearch) -> Figures:
    main, points = [], []
    for slo, found in search.of_limits.items():
        before = f"{load.name}, {slo}, "
        main += rows.named([rows.best_row(found)], before)
        points += rows.named(rows.point_rows(found.points), before)
    return Figures(main=main, points=points)
