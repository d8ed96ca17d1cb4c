"""What a benchmark has come to, and the folder that keeps it. Owns what is written and shown."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import report
from bench.goodputs import page, plots, rows
from bench.goodputs.backend import Served
from bench.goodputs.config import GoodputConfig
from bench.goodputs.records import Record
from bench.goodputs.runner import Run
from bench.goodputs.search import Search
from bench.report import Row

QUESTION = "How many requests a second are answered within their limits?"
# In its folder.
RECORDS, FIGURES, SETTINGS = "records.jsonl", "figures.json", "settings.json"


@dataclass(kw_only=True)
class Findings:
    """Filled in as runs go on, so that what there is can be kept where one fails.

    `alone` is the request that was sent to a server with nothing else to do.
    """

    config: GoodputConfig
    folder: Path
    served: Served | None = None
    alone: Record | None = None
    runs: Sequence[Run] = ()
    search: Search | None = None
    failure: str = ""
    warned: list[str] = field(default_factory=list)

    def keep(self) -> None:
        """Print the table; write figures, drawings, settings and report. There must be a run."""
        self.warned = self._warnings()
        tables = self._tables()
        shown = [row for table in tables.values() for row in table]
        for file in (self.folder / FIGURES, self.config.json_file):
            if file is not None:
                report.write(QUESTION, shown, file)
        report.show(QUESTION, next(iter(tables.values())))
        settings = self.config.model_dump_json(indent=1)
        (self.folder / SETTINGS).write_text(settings + "\n")
        drawings = {}
        if self.config.plots:
            limits, wanted = self.config.limits, self.config.wanted
            records = [record for run in self.runs for record in run.records]
            drawn = plots.draw(records, limits, wanted.attainment, wanted.confidence)
            drawings = {name: plots.save(each, self.folder, name) for name, each in drawn.items()}
        page.write(
            self.folder / "report.html",
            title=QUESTION,
            verdict=self.verdict(),
            served=self._around(),
            settings=json.loads(settings),
            tables=tables,
            warnings=[self.failure, *self.warned] if self.failure else self.warned,
            drawings=drawings,
        )

    def verdict(self) -> list[str]:
        """Return what came out, in sentences."""
        config = self.config
        if self.search is None:
            return [line(run) for run in self.runs]
        said = [str(point) for point in self.search.points]
        if self.failure:
            return ["The search did not come to its end.", *said]
        best = self.search.best
        if best is not None:
            sure = "" if best.is_sure else ", which its runs left unsure"
            first = (
                f"{best.rate:g} requests/s is the highest rate at which"
                f" {100 * config.attainment:g}% keep {config.limits}{sure}."
            )
            return [first, *said]
        lowest = min(self.runs, key=lambda run: run.rate)
        alone = "; ".join(
            f"{name} alone by {100 * met / lowest.metrics.submitted:.1f}%"
            for name, met in lowest.metrics.met_alone.items()
        )
        first = (
            f"No rate down to {lowest.rate:g} requests/s has {100 * config.attainment:g}% keep"
            f" {config.limits} ({alone}): the limits are too tight for this server, or --lowest is"
            " too high."
        )
        return [first, *said]

    @property
    def is_none_enough(self) -> bool:
        """Whether a search has found no rate."""
        return self.search is not None and self.search.best is None

    def _tables(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        if self.search is not None and self.search.points:
            found["search"] = [] if self.failure else [rows.best_row(self.search)]
            found["search"] += rows.point_rows(self.search.points)
        elif len(self.runs) > 1:
            found["sweep"] = rows.sweep_rows(self.runs)
        if not found:
            return {line(self.runs[0]): rows.run_rows(self.runs[0])}
        for run in self.runs:
            before = f"run {run.number}, {run.rate:g} requests/s, "
            found[line(run)] = rows.run_rows(run, before)
        return found

    def _warnings(self) -> list[str]:
        config = self.config
        said = []
        if self.alone is not None and (missed := config.limits.missed(self.alone)):
            beyond = ", ".join(name.removesuffix("_s").upper() for name in missed)
            said.append(
                f"a request alone takes {1e3 * self.alone.ttft_s:.4g} ms to its first token and"
                f" {1e3 * self.alone.tpot_s:.4g} ms for each other, beyond the limit of {beyond}"
            )
        for run in self.runs:
            found = rows.warnings(run.metrics, config.late_limit)
            said += [f"run {run.number}: {each}" for each in found]
        return said

    def _around(self) -> dict[str, str]:
        served = self.served
        assert served is not None
        return {
            "server": served.version,
            "model": served.model,
            "limits": str(self.config.limits),
            "records": RECORDS,
        }


def line(run: Run) -> str:
    """Return a run in a line."""
    found = run.metrics
    return (
        f"run {run.number}: {run.rate:.4g} requests/s offered, {100 * found.attainment:.1f}% of"
        f" {found.submitted} kept their limits, goodput {found.request_goodput:.4g} requests/s,"
        f" TTFT p50 {1e3 * found.ttft.median_s:.4g} ms, TPOT p50 {1e3 * found.tpot.median_s:.4g} ms"
    )
