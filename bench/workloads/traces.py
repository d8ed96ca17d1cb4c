"""Requests of traces as workloads take them. Owns which public ones there are; see the README
beside them. Their formats are `planner.traces`' own.
"""

import random
from dataclasses import replace
from pathlib import Path

from bench.workloads.arrivals import Arrival, WorkloadError
from planner.errors import TraceError
from planner.traces import read_trace

# Name: its file, and the seconds that its arrivals are rounded to.
NAMED: dict[str, tuple[str, float]] = {
    "azure-code": ("AzureLLMInferenceTrace_code.csv.gz", 0.0),
    "azure-conv": ("AzureLLMInferenceTrace_conv.csv.gz", 0.0),
    "mooncake-conversation": ("mooncake_conversation_trace.jsonl.gz", 3.0),
    "mooncake-synthetic": ("mooncake_synthetic_trace.jsonl.gz", 0.0),
}


def read(
    path: Path, *, spread_s: float = 0.0, limit: int | None = None, seed: str = ""
) -> list[Arrival]:
    """Return a trace's requests, or the first `limit`, in order, the first at 0 seconds.

    Each is put off by up to `spread_s` at random, the same for the same seed: for traces whose
    times are rounded. Raises WorkloadError where the file cannot be read, naming the line.
    """
    try:
        requests = read_trace(path, limit)
    except TraceError as exc:
        raise WorkloadError(str(exc)) from exc
    found = [
        Arrival(
            at_s=each.at_s,
            prompt_tokens=each.prompt_tokens,
            output_tokens=each.output_tokens,
            blocks=each.blocks,
        )
        for each in requests
    ]
    if spread_s:
        rng = random.Random(seed)
        found = [replace(each, at_s=each.at_s + rng.uniform(0, spread_s)) for each in found]
        found.sort(key=lambda arrival: arrival.at_s)
    return [replace(each, at_s=each.at_s - found[0].at_s) for each in found]
