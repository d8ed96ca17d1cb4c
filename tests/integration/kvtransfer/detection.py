"""How long the survivor of a transfer took to notice; the table and the file that say so.

Owns measurements; judges none of them. A row is one kind of harm, done to one side, on one lane.
"""

import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

QUESTION = "How long until one side of a KV transfer notices that the other died or stands still?"
_RANKS = {"send": "prefill", "receive": "decode"}
_COLUMNS = ("count", "under_way", "median_ms", "p99_ms", "max_ms", "over_limit")


@dataclass
class Row:
    """Detection times in seconds, and what ended the transfers.

    `limit_s` is what is hoped for. `under_way` counts transfers of which the survivor had moved
    something, and not all that was ready (a mapped sender has moved what it has announced).
    """

    lane: str
    victim: str
    signal: Signals
    limit_s: float
    seconds: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    under_way: int = 0

    @property
    def name(self) -> str:
        """What was done to whom."""
        return f"{self.lane}: {self.signal.name} to {_RANKS[self.victim]}"

    def figures(self) -> dict[str, Any]:
        """Return the row as plain values, times in milliseconds."""
        ordered = sorted(self.seconds)
        return {
            "row": self.name,
            "count": len(ordered),
            "under_way": self.under_way,
            "median_ms": round(1e3 * statistics.median(ordered), 1),
            "p99_ms": round(1e3 * ordered[int(0.99 * (len(ordered) - 1) + 0.5)], 1),
            "max_ms": round(1e3 * ordered[-1], 1),
            "limit_ms": round(1e3 * self.limit_s, 1),
            "over_limit": sum(each > self.limit_s for each in ordered),
            "outcomes": dict(self.outcomes.most_common()),
        }


@contextmanager
def reported() -> Iterator[list[Row]]:
    """Collect rows; print them at the end, and keep them where TWINPOOL_REPORT_DIR says."""
    rows: list[Row] = []
    try:
        yield rows
    finally:
        figures = [row.figures() for row in rows if row.seconds]
        print(f"\n{QUESTION}\n{'':36}" + "".join(f"{name:>12}" for name in _COLUMNS))
        for each in figures:
            numbers = "".join(f"{each[name]:>12}" for name in _COLUMNS)
            outcomes = ", ".join(f"{name} {count}" for name, count in each["outcomes"].items())
            print(f"{each['row']:36}{numbers}  {outcomes}")
        if folder := os.environ.get("TWINPOOL_REPORT_DIR"):
            machine = f"{platform.machine()}, {os.cpu_count()} cores"
            said = {"question": QUESTION, "machine": machine, "rows": figures}
            Path(folder, "transfer-kills.json").write_text(json.dumps(said, indent=1) + "\n")
