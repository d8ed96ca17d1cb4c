"""Reads request traces: when each request came, and how many tokens it had. Owns their formats.

`.csv` has the columns of Azure's LLM inference traces, `.jsonl` the fields of Mooncake's; either
may be gzipped. Nothing else of a line is looked at.
"""

import csv
import gzip
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from planner.errors import TraceError

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request: seconds since the first one, tokens in, tokens out."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path) -> list[Request]:
    """Return the requests of a trace in its order.

    Raises TraceError naming the line where one is missing something or goes back in time.
    """
    lines = _format(path)
    try:
        with _opened(path) as file:
            requests = list(_checked(path, lines(path, file)))
    except (OSError, EOFError, UnicodeDecodeError) as exc:
        raise TraceError(f"trace {path}: cannot be read: {exc}") from exc
    if not requests:
        raise TraceError(f"trace {path}: has no requests")
    return requests


_Lines = Iterable[tuple[int, float, int, int]]


def _format(path: Path) -> Callable[[Path, TextIO], _Lines]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        return _azure
    if name.endswith(".jsonl"):
        return _mooncake
    raise TraceError(
        f"trace {path}: ends in neither .csv (with {', '.join(_AZURE)}) nor .jsonl (with "
        f"{', '.join(_MOONCAKE)}), nor in one of them and .gz"
    )


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _checked(path: Path, lines: _Lines) -> Iterator[Request]:
    first_s = last_s = None
    for number, at_s, prompt, output in lines:
        if prompt < 1 or output < 1:
            raise TraceError(
                f"trace {path}, line {number}: {prompt} prompt and {output} output tokens; both "
                "must be at least 1"
            )
        first_s = at_s if first_s is None else first_s
        if last_s is not None and at_s < last_s:
            raise TraceError(
                f"trace {path}, line {number}: goes {last_s - at_s:g} s back in time; sort it"
            )
        last_s = at_s
        yield Request(at_s=at_s - first_s, prompt_tokens=prompt, output_tokens=output)


def _azure(path: Path, file: TextIO) -> _Lines:
    reader = csv.DictReader(file)
    missing = [column for column in _AZURE if column not in (reader.fieldnames or ())]
    if missing:
        raise TraceError(
            f"trace {path}: has no column {', '.join(missing)}; found "
            f"{', '.join(reader.fieldnames or ()) or 'nothing'}"
        )
    for row in reader:
        yield _numbers(path, reader.line_num, row, _AZURE, _moment)


def _mooncake(path: Path, file: TextIO) -> _Lines:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as exc:
            raise TraceError(f"trace {path}, line {number}: is no JSON: {exc}") from exc
        missing = [name for name in _MOONCAKE if not isinstance(row, dict) or name not in row]
        if missing:
            raise TraceError(f"trace {path}, line {number}: has no field {', '.join(missing)}")
        yield _numbers(path, number, row, _MOONCAKE, lambda value: float(value) / 1000)


def _numbers(
    path: Path,
    number: int,
    row: dict[str, Any],
    names: tuple[str, str, str],
    seconds: Callable[[Any], float],
) -> tuple[int, float, int, int]:
    at, prompt, output = (row[name] for name in names)
    try:
        at_s = seconds(at)
        if not math.isfinite(at_s) or isinstance(prompt, float) or isinstance(output, float):
            raise ValueError("a time must be finite, and tokens whole numbers")
        return number, at_s, int(prompt), int(output)
    except (TypeError, ValueError) as exc:
        found = ", ".join(f"{name} {row[name]!r}" for name in names)
        raise TraceError(f"trace {path}, line {number}: {found}: {exc}") from exc


def _moment(text: str) -> float:
    # Azure's stamps have a digit more than Python takes; they name no time zone.
    return datetime.fromisoformat(f"{text[:26]}+00:00").timestamp()
