"""Slices of public request traces, as a replay over pools takes them: full blocks alone."""

from dataclasses import replace
from pathlib import Path

from bench.workloads import traces
from bench.workloads.arrivals import Arrival
from planner.traces import BLOCK

__all__ = ["BLOCK", "TRACES", "Arrival", "read"]

# The times of mooncake's are spread, since one of the two has them rounded.
_SPREAD_S = 3.0
TRACES = {
    name.removeprefix("azure-").replace("-", " "): file for name, (file, _) in traces.NAMED.items()
}


def read(folder: Path, trace: str, requests: int) -> list[Arrival]:
    """Return the first so many requests of a trace, the first of them at 0 seconds."""
    spread_s = _SPREAD_S if trace.startswith("mooncake") else 0.0
    found = traces.read(folder / TRACES[trace], spread_s=spread_s, limit=requests, seed=trace)
    # The last block is in part another prompt's, and is computed anyway.
    return [
        replace(each, blocks=each.blocks[: (each.prompt_tokens - 1) // BLOCK]) for each in found
    ]
