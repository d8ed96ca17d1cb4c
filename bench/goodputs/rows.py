"""A benchmark's outcome as rows of the schema that all benchmarks share, and what to beware of."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bench.goodputs.metrics import Metrics, Times
from bench.goodputs.runner import Run
from bench.goodputs.search import Point, Search
from bench.report import Row

_SHOWN = ("ttft", "tpot", "itl", "e2el")


def named(rows: Iterable[Row], before: str) -> list[Row]:
    """Return rows whose names have something before them."""
    return [replace(row, row=before + row.row) for row in rows]


def run_rows(run: Run, before: str = "") -> list[Row]:
    """Return all figures of a run."""
    found = run.metrics
    rows = [
        _row("attainment", 100 * found.attainment, "%"),
        *(
            _row(f"{name} alone attained", 100 * met / found.submitted, "%")
            for name, met in found.met_alone.items()
        ),
        _row("request goodput", found.request_goodput, "requests/s"),
        _row("request throughput", found.request_throughput, "requests/s"),
        _row("output throughput", found.output_throughput, "tokens/s"),
        _row("total token throughput", found.total_token_throughput, "tokens/s"),
        _row("submitted", found.submitted, "requests"),
        *(
            _row(outcome, count, "requests", higher_is_better=outcome == "finished")
            for outcome, count in sorted(found.outcomes.items())
        ),
    ]
    for name in _SHOWN:
        rows += _times(name.upper(), getattr(found, name))
    rows.append(_row("sent late, at most", 1e3 * found.late_s, "ms", higher_is_better=False))
    return named(rows, before)


def sweep_rows(runs: Sequence[Run]) -> list[Row]:
    """Return the main figures of each run."""
    main = ("attainment", "request goodput", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99")
    return [
        row
        for run in runs
        for row in named(
            [each for each in run_rows(run) if each.row in main],
            f"{run.rate:g} requests/s, run {run.number}, ",
        )
    ]


def best_row(search: Search) -> Row:
    """Return what a search has found; a rate of 0 where none attains enough.

    Its spread is how far up the lowest rate is that did not; without one the search had no end.
    """
    wanted, best, failed = search.points[0].wanted, search.best, search.lowest_failed
    rate = best.rate if best else 0.0
    name = f"highest rate of {100 * wanted.attainment:g}% attainment"
    return _row(name, rate, "requests/s", spread=None if failed is None else failed - rate)


def point_rows(points: Sequence[Point]) -> list[Row]:
    """Return what is known of each rate that a search has run."""
    rows = []
    for point in points:
        low, high = point.interval
        name = f"{point.rate:g} requests/s, attainment of {point.runs} runs"
        rows.append(_row(name, 100 * point.attainment, "%", spread=100 * (high - low)))
    return rows


def warnings(metrics: Metrics, late_limit_s: float) -> list[str]:
    """Return what makes a run's figures less than they seem, in sentences."""
    said = []
    if metrics.late_s > late_limit_s:
        said.append(
            f"a request was sent {1e3 * metrics.late_s:.0f} ms late: this program, or what shares"
            " its cores, is too slow for the rate, and times are those of a lighter load"
        )
    if metrics.short:
        said.append(
            f"{metrics.short} of {metrics.completed} answers have fewer tokens than were asked"
            " for: the server ends them early"
        )
    missed = metrics.submitted - metrics.completed
    if missed:
        said.append(f"{missed} of {metrics.submitted} requests were not answered to their end")
    return said + [f"said {count} times: {error}" for error, count in metrics.errors]


def _times(name: str, times: Times) -> list[Row]:
    named = {"mean": times.mean_s, "std": times.std_s}
    named |= {f"p{percent:g}": value for percent, value in times.percentiles_s.items()}
    return [
        _row(f"{name} {figure}", 1e3 * value, "ms", higher_is_better=False)
        for figure, value in named.items()
    ]


def _row(
    name: str,
    value: float,
    unit: str,
    *,
    higher_is_better: bool = True,
    spread: float | None = None,
) -> Row:
    return Row(row=name, ours=value, unit=unit, higher_is_better=higher_is_better, spread=spread)
