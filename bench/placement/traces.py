"""Reads slices of public request traces. Owns their formats; see the README beside the traces."""

import csv
import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

# Tokens of a block that a trace names, and mooncake's arrivals are rounded to so many seconds.
BLOCK = 512
_ROUNDED_S = 3.0
TRACES = {
    "code": "AzureLLMInferenceTrace_code.csv.gz",
    "conv": "AzureLLMInferenceTrace_conv.csv.gz",
    "mooncake conversation": "mooncake_conversation_trace.jsonl.gz",
    "mooncake synthetic": "mooncake_synthetic_trace.jsonl.gz",
}


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request of a trace. `blocks` name the beginning of its prompt; empty: not told."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read(folder: Path, trace: str, requests: int) -> list[Arrival]:
    """Return the first so many requests of a trace, the first of them at 0 seconds."""
    path = folder / TRACES[trace]
    rng = random.Random(trace)
    with gzip.open(path, "rt", newline="") as file:
        found = list(
            islice(_azure(file) if ".csv" in path.name else _mooncake(file, rng), requests)
        )
    found.sort(key=lambda arrival: arrival.at_s)
    return [
        Arrival(
            at_s=arrival.at_s - found[0].at_s,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=arrival.output_tokens,
            blocks=arrival.blocks,
        )
        for arrival in found
    ]


def _azure(lines: Iterator[str]) -> Iterator[Arrival]:
    for row in csv.DictReader(lines):
        # A digit more than strptime takes.
        moment = datetime.strptime(row["TIMESTAMP"][:26], "%Y-%m-%d %H:%M:%S.%f")
        yield Arrival(
            at_s=moment.timestamp(),
            prompt_tokens=int(row["ContextTokens"]),
            output_tokens=int(row["GeneratedTokens"]),
        )


def _mooncake(lines: Iterator[str], rng: random.Random) -> Iterator[Arrival]:
    for line in lines:
        row = json.loads(line)
        yield Arrival(
            at_s=row["timestamp"] / 1000 + rng.uniform(0, _ROUNDED_S),
            prompt_tokens=row["input_length"],
            output_tokens=row["output_length"],
            # The last block is in part another prompt's, and is computed anyway.
            blocks=tuple(row["hash_ids"][: (row["input_length"] - 1) // BLOCK]),
        )
