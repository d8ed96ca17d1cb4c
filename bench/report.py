"""How every benchmark shows and keeps its figures. Owns the schema; measures nothing."""

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import typer
from rich.table import Table

from launch.console import table_console


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure.

    Attributes:
        limit: What the machine allows, measured in the same run; None where there is none.
        peer: What another system does, measured in the same run; None where none was run.
        spread: Distance between the quartiles, in the row's unit.
    """

    row: str
    ours: float
    unit: str
    higher_is_better: bool
    limit: float | None = None
    peer: float | None = None
    peer_name: str | None = None
    spread: float | None = None


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The median of at least two values, and the distance between their quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, high - low


class GrowingReport:
    """A report whose rows are kept as they come, where a later one may fail or take too long.

    Attributes:
        rows: By name.
        failed: What was attempted in vain.
    """

    def __init__(self, question: str, json_file: Path | None) -> None:
        self.rows: dict[str, Row] = {}
        self.failed: list[str] = []
        self._question = question
        self._json_file = json_file

    def put(self, row: Row) -> None:
        """Show a row and write it, in the place of an earlier one of its name."""
        self.rows[row.row] = row
        beside = f", {row.peer_name} {row.peer:.4g}" if row.peer else ""
        typer.echo(f"{row.row}: {row.ours:.4g} {row.unit}{beside}", err=True)
        if self._json_file is not None:
            write(self._question, list(self.rows.values()), self._json_file)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Go on behind it where it fails, and say why."""
        try:
            yield
        except Exception as exc:
            self.failed.append(name)
            typer.echo(f"{name}: FAILED, {type(exc).__name__}: {exc}", err=True)

    def end(self) -> None:
        """Print the table; ends the program with 1 where an attempt failed."""
        show(self._question, list(self.rows.values()))
        if self.failed:
            typer.echo(f"failed: {'; '.join(self.failed)}", err=True)
            raise typer.Exit(1)


def report(question: str, rows: Sequence[Row], json_file: Path | None) -> None:
    """Print a table, and write the figures to `json_file` where one is given."""
    show(question, rows)
    if json_file is not None:
        write(question, rows, json_file)


def show(question: str, rows: Sequence[Row]) -> None:
    """Print a table."""
    title = f"{question}\n{machine()}, commit {commit()}"
    table = Table(title=title, title_justify="left")
    for column in ("row", "ours", "spread", "limit", "of limit", "peer", "of peer"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for row in rows:
        table.add_row(
            row.row,
            f"{row.ours:.4g} {row.unit}",
            _number(row.spread),
            _number(row.limit),
            _ratio(row.ours, row.limit),
            f"{_number(row.peer)} {row.peer_name or ''}".strip(),
            _ratio(row.ours, row.peer),
        )
    table_console().print(table)


def write(question: str, rows: Sequence[Row], json_file: Path) -> None:
    """Write the figures to a file."""
    figures = {
        "question": question,
        "machine": machine(),
        "commit": commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [asdict(row) for row in rows],
    }
    json_file.write_text(json.dumps(figures, indent=1) + "\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _ratio(ours: float, other: float | None) -> str:
    return "-" if not other else f"{ours / other:.2f}x"


def machine() -> str:
    """Return what this program runs on, in words."""
    return "; ".join((f"{_processor()}, {len(os.sched_getaffinity(0))} cores", *_gpus()))


@cache
def _gpus() -> tuple[str, ...]:
    """Return the GPUs of this machine, each with its driver's version."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        return ()
    return tuple(line.replace(", ", ", driver ") for line in done.stdout.splitlines())


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Return which version of the code this is; TWINPOOL_COMMIT says it of a copy without git's."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip() or os.environ.get("TWINPOOL_COMMIT") or "unknown"
