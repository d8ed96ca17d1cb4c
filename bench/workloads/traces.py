"""Reads request traces from files. Owns their formats; see the README beside the public ones.

Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens) and Mooncake's JSON lines (timestamp,
input_length, output_length, hash_ids), either of them packed by gzip or not.
"""

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from bench.workloads.arrivals import BLOCK, Arrival, WorkloadError

# Name: its file, and the seconds that its arrivals are rounded to.
NAMED: dict[str, tuple[str, float]] = {
    "azure-code": ("AzureLLMInferenceTrace_code.csv.gz", 0.0),
    "azure-conv": ("AzureLLMInferenceTrace_conv.csv.gz", 0.0),
    "mooncake-conversation": ("mooncake_conversation_trace.jsonl.gz", 3.0),
    "mooncake-synthetic": ("mooncake_synthetic_trace.jsonl.gz", 0.0),
}
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceError(WorkloadError):
    """A trace's file cannot be read; the message names the line."""


def read(
    path: Path, *, spread_s: float = 0.0, limit: int | None = None, seed: str = ""
) -> list[Arrival]:
    """Return a trace's requests, or the first `limit`, in order, the first at 0 seconds.

    Each is put off by up to `spread_s` at random, the same for the same seed: for traces whose
    times are rounded. Raises TraceError.
    """
    parse = _azure if ".csv" in path.name else _mooncake
    try:
        with _opened(path) as file:
            found = list(islice(_checked(path, parse(path, file)), limit))
    except (OSError, EOFError, UnicodeDecodeError) as exc:
        raise TraceError(f"{path}: cannot be read: {exc}") from exc
    if not found:
        raise TraceError(f"{path}: there is no request in it")
    rng = random.Random(seed)
    if spread_s:
        found = [replace(each, at_s=each.at_s + rng.uniform(0, spread_s)) for each in found]
        found.sort(key=lambda arrival: arrival.at_s)
    return [replace(each, at_s=each.at_s - found[0].at_s) for each in found]


def _opened(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", newline="", encoding="utf-8")
    return path.open(newline="", encoding="utf-8")


def _checked(path: Path, numbered: Iterator[tuple[int, Arrival]]) -> Iterator[Arrival]:
    """Pass on requests that can be sent; raises TraceError at the first one that cannot."""
    before_s = None
    for line, arrival in numbered:
        if before_s is not None and arrival.at_s < before_s:
            raise TraceError(
                f"{path}, line {line}: the time goes back by {before_s - arrival.at_s:g} s; sort"
                " the trace by time"
            )
        if arrival.prompt_tokens < 1 or arrival.output_tokens < 1:
            raise TraceError(
                f"{path}, line {line}: found {arrival.prompt_tokens} prompt and"
                f" {arrival.output_tokens} output tokens; there must be at least one of each"
            )
        before_s = arrival.at_s
        yield arrival


def _azure(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Arrival]]:
    rows = csv.DictReader(lines)
    missing = [name for name in _AZURE if name not in (rows.fieldnames or ())]
    if missing:
        raise TraceError(
            f"{path}: lacks the column {missing[0]}; it has"
            f" {', '.join(rows.fieldnames or ()) or 'none'}, and needs {', '.join(_AZURE)}"
        )
    for row in rows:
        yield rows.line_num, _parsed(path, rows.line_num, row, _azure_arrival)


def _azure_arrival(row: dict[str, Any]) -> Arrival:
    # A digit more than strptime takes.
    moment = datetime.strptime(row["TIMESTAMP"][:26], "%Y-%m-%d %H:%M:%S.%f")
    return Arrival(
        at_s=moment.timestamp(),
        prompt_tokens=int(row["ContextTokens"]),
        output_tokens=int(row["GeneratedTokens"]),
    )


def _mooncake(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Arrival]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _parsed(path, number, line, _mooncake_arrival)


def _mooncake_arrival(line: str) -> Arrival:
    row = json.loads(line)
    prompt_tokens, blocks = int(row["input_length"]), tuple(map(int, row.get("hash_ids") or ()))
    wanted = -(-prompt_tokens // BLOCK)
    if blocks and len(blocks) != wanted:
        raise ValueError(
            f"{prompt_tokens} prompt tokens are {wanted} blocks of {BLOCK}, found {len(blocks)}"
            " hash_ids"
        )
    return Arrival(
        at_s=row["timestamp"] / 1000,
        prompt_tokens=prompt_tokens,
        output_tokens=int(row["output_length"]),
        blocks=blocks,
    )


def _parsed(path: Path, line: int, row: Any, parse: Callable[[Any], Arrival]) -> Arrival:
    try:
        return parse(row)
    except KeyError as exc:
        raise TraceError(f"{path}, line {line}: lacks the field {exc}") from exc
    except (TypeError, ValueError) as exc:
        raise TraceError(f"{path}, line {line}: {exc}") from exc
