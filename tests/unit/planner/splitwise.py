"""The slice of Splitwise's table that tests use, as measured passes; see tests/data/splitwise.

Fitted are Llama-2 70B over 2 and 8 GPUs. Held out is what a plan asks of a calibration: another
model (Bloom 176B over 8) and another layout (Llama-2 70B over 4). Both on A100 and on H100.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from planner.hardware import Device, find_device
from planner.layout import Layout, Role
from planner.measured import Measured
from planner.memory import memory
from planner.models import published

_TABLE = Path(__file__).parents[2] / "data/splitwise/medians.csv"
_MODELS = {"llama2-70b": "llama-2-70b", "bloom-176b": "bloom-176b"}
# Token times are means over 128 output tokens.
_MEAN_OUTPUT = 64
GPUS = {"a100": "a100-80gb", "h100": "h100-80gb"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A row of the table: a prompt phase and a token phase."""

    tp: int
    prompt: Measured
    token: Measured

    @property
    def is_fitted(self) -> bool:
        return self.prompt.shape.name == "llama-2-70b" and self.tp in (2, 8)

    @property
    def tokens_held(self) -> int:
        """Tokens in the cache at the end."""
        return self.prompt.batch * (self.prompt.tokens + 2 * _MEAN_OUTPUT)


def device(gpu: str) -> Device:
    return find_device(GPUS[gpu])


def points(gpu: str) -> Iterator[Point]:
    """Yield the table's rows of a GPU."""
    shapes = published()
    with _TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["hardware"] != GPUS[gpu]:
                continue
            tp, batch, size = (
                int(row[name]) for name in ("tensor_parallel", "batch_size", "prompt_size")
            )
            shape = shapes[_MODELS[row["model"]]]
            prompt = Measured(
                role=Role.PREFILL,
                shape=shape,
                layout=Layout(tp=tp),
                batch=batch,
                tokens=size,
                seconds=float(row["prompt_ms"]) / 1e3,
            )
            token = Measured(
                role=Role.DECODE,
                shape=shape,
                layout=Layout(tp=tp),
                batch=batch,
                tokens=size + _MEAN_OUTPUT,
                seconds=float(row["token_ms"]) / 1e3,
            )
            yield Point(tp=tp, prompt=prompt, token=token)


def fits(gpu: str, point: Point) -> bool:
    """Whether the planner says that the row's work fits into the GPUs it was measured on."""
    held = memory(
        point.prompt.shape,
        point.prompt.layout,
        device_bytes=device(gpu).memory_bytes,
        reserve=0.1,
        pass_tokens=point.prompt.batch * point.prompt.tokens,
    )
    return held.kv_tokens >= point.tokens_held
