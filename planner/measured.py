"""Measured times that a calibration can be fitted to. Owns how benchmark files are read as such.

The benchmarks' files hold rows by name; those of engines alone say what was computed: "dense, batch
4 x 1,024, ..." is a decode step, "dense, 2,048 x 4, ..." are four prompts.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from planner.errors import HardwareError
from planner.layout import Layout, Role
from planner.shape import ModelShape

_DECODE = re.compile(r"(\w+), batch (\d+) x ([\d,]+), beside ")
_PREFILL = re.compile(r"(\w+), ([\d,]+) x (\d+), beside ")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One pass that was timed.

    Attributes:
        tokens: Of each prompt, or cached for each sequence of a decode step.
        batch: Prompts or sequences.
    """

    role: Role
    shape: ModelShape
    layout: Layout
    batch: int
    tokens: int
    seconds: float


def read_bench(path: Path, model: str, shape: ModelShape) -> list[Measured]:
    """Return the rows of a benchmark's JSON file that are about `model`, as the rows call it.

    Raises HardwareError where the file is not such a one, or has no such rows.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        found = {row["row"]: float(row["ours"]) for row in rows if row["unit"] == "tokens/s"}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise HardwareError(f"{path}: is no benchmark's file: {exc!r}") from exc
    measured = list(_measured(found, model, shape))
    if not measured:
        raise HardwareError(
            f"{path}: has no prefill or decode rows of {model!r}; give what the names begin with"
        )
    return measured


def _measured(rows: dict[str, float], model: str, shape: ModelShape) -> Iterator[Measured]:
    seen = set()
    for name, tokens_per_s in rows.items():
        decode, prefill = _DECODE.match(name), _PREFILL.match(name)
        match = decode or prefill
        if match is None or match[1] != model:
            continue
        first, second = (int(group.replace(",", "")) for group in match.groups()[1:])
        role = Role.DECODE if decode else Role.PREFILL
        batch, tokens = (first, second) if decode else (second, first)
        if (role, batch, tokens) in seen:  # the same figure stands beside each peer
            continue
        seen.add((role, batch, tokens))
        yield Measured(
            role=role,
            shape=shape,
            layout=Layout(),
            batch=batch,
            tokens=tokens,
            seconds=(batch if decode else batch * tokens) / tokens_per_s,
        )
