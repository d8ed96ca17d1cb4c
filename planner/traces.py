"""Reads request traces: when each request came, and how many tokens it had. Owns their formats.

`.csv` has the columns of Azure's LLM inference traces, `.jsonl` the fields of Mooncake's; either
may be gzipped. Nothing else of a line is looked at.
"""

import csv
import gzip
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from planner.errors import TraceError

# Prompt tokens of a block that a trace of Mooncake's names.
BLOCK = 512

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request: seconds since the first one, tokens in, tokens out.

    `blocks` name the whole prompt, BLOCK tokens at a time, the last one maybe less: equal numbers
    are equal tokens after equal ones. Empty where the trace has none.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(path: Path, limit: int | None = None) -> list[Request]:
    """Return the requests of a trace in its order, or the first `limit`.

    Raises TraceError naming the line where one is missing something or goes back in time.
    """
    lines = _format(path)
    try:
        with _opened(path) as file:
            requests = list(islice(_checked(path, lines(path, file)), limit))
    except (OSError, EOFError, UnicodeDecodeError) as exc:
        raise TraceError(f"trace {path}: cannot be read: {exc}") from exc
    if not requests:
        raise TraceError(f"trace {path}: has no requests")
    return requests


# The number of its line, and a request whose time is the trace's own.
_Lines = Iterable[tuple[int, Request]]


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
    for number, found in lines:
        if found.prompt_tokens < 1 or found.output_tokens < 1:
            raise TraceError(
                f"trace {path}, line {number}: {found.prompt_tokens} prompt and "
                f"{found.output_tokens} output tokens; both must be at least 1"
            )
        first_s = found.at_s if first_s is None else first_s
        if last_s is not None and found.at_s < last_s:
            raise TraceError(
                f"trace {path}, line {number}: goes {last_s - found.at_s:g} s back in time; sort it"
            )
        last_s = found.at_s
        yield replace(found, at_s=found.at_s - first_s)


def _azure(path: Path, file: TextIO) -> _Lines:
    reader = csv.DictReader(file)
    missing = [column for column in _AZURE if column not in (reader.fieldnames or ())]
    if missing:
        raise TraceError(
            f"trace {path}: has no column {', '.join(missing)}; found "
            f"{', '.join(reader.fieldnames or ()) or 'nothing'}"
        )
    for row in reader:
        yield reader.line_num, _request(path, reader.line_num, row, _AZURE, _moment)


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
        found = _request(path, number, row, _MOONCAKE, lambda value: float(value) / 1000)
        yield number, replace(found, blocks=_blocks(path, number, row, found.prompt_tokens))


def _request(
    path: Path,
    number: int,
    row: dict[str, Any],
    names: tuple[str, str, str],
    seconds: Callable[[Any], float],
) -> Request:
    at, prompt, output = (row[name] for name in names)
    try:
        at_s = seconds(at)
        if not math.isfinite(at_s) or isinstance(prompt, float) or isinstance(output, float):
            raise ValueError("a time must be finite, and tokens whole numbers")
        return Request(at_s=at_s, prompt_tokens=int(prompt), output_tokens=int(output))
    except (TypeError, ValueError) as exc:
        found = ", ".join(f"{name} {row[name]!r}" for name in names)
        raise TraceError(f"trace {path}, line {number}: {found}: {exc}") from exc


def _blocks(path: Path, number: int, row: dict[str, Any], prompt_tokens: int) -> tuple[int, ...]:
    """Return the blocks of a prompt; raises TraceError where they are not as many as it has."""
    try:
        blocks = tuple(map(int, row.get("hash_ids") or ()))
    except (TypeError, ValueError) as exc:
        raise TraceError(f"trace {path}, line {number}: hash_ids: {exc}") from exc
    wanted = -(-prompt_tokens // BLOCK)
    if blocks and len(blocks) != wanted:
        raise TraceError(
            f"trace {path}, line {number}: {prompt_tokens} prompt tokens are {wanted} blocks of"
            f" {BLOCK}, found {len(blocks)} hash_ids"
        )
    return blocks


def _moment(text: str) -> float:
    # Azure's stamps have a digit more than Python takes; they name no time zone.
    return datetime.fromisoformat(f"{text[:26]}+00:00").timestamp()
