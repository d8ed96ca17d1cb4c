"""Fits a calibration to measured passes by least squares. Pure.

A pass is a sum of amounts times unknowns (`planner.work`): one over each efficiency, seconds of a
hop, of a layer, of a sequence. Errors are relative, so a millisecond's pass counts as much as a
second's. Whether arithmetic or memory bounds a pass depends on the unknowns, so that is settled in
turns. From how many tokens of a pass on messages are slow is tried out, in powers of two.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from planner.calibration import Calibration
from planner.costs import Chunk, RooflineCosts, links
from planner.errors import HardwareError
from planner.hardware import Device
from planner.layout import Role
from planner.measured import Measured
from planner.work import PassCounter, Work

_Array = NDArray[np.float64]

# The columns: one over the efficiencies of arithmetic, memory, link and large messages, which are
# at least 1; then seconds of a hop, a layer and a sequence.
_COMPUTE, _MEMORY = 0, 1
_LEAST = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
_FIRST = np.array([1.5, 1.5, 1.5, 3.0, 5e-6, 50e-6, 300e-6])
_TURNS = 60
_LARGE_FROM = (2048, 256, 512, 1024, 4096, 8192)


def fit(rows: Sequence[Measured], device: Device, source: str) -> Calibration:
    """Return the calibration nearest to the rows. Raises HardwareError where they are too few.

    What no row tells (a link where all rows have one rank) keeps the figure it is assumed to have.
    """
    if len(rows) < 4:
        raise HardwareError(f"{len(rows)} measured rows are too few to fit to; give 4 at least")
    fits = [_fit(rows, device, source, large_from) for large_from in _LARGE_FROM]
    return min(fits, key=lambda calibration: error(rows, device, calibration))


def error(rows: Sequence[Measured], device: Device, calibration: Calibration) -> float:
    """Return the sum of squared relative errors of what the calibration predicts for the rows."""
    return sum((predict(row, device, calibration) / row.seconds - 1) ** 2 for row in rows)


def predict(row: Measured, device: Device, calibration: Calibration) -> float:
    """Return the seconds that a measured pass should have taken."""
    costs = RooflineCosts(
        shape=row.shape,
        layout=row.layout,
        device=device,
        calibration=calibration,
        pass_tokens=row.batch * row.tokens,  # all prompts at once
    )
    if row.role is Role.PREFILL:
        return costs.prefill_s([Chunk(row.tokens)] * row.batch)
    return costs.decode_step_s(row.batch, row.batch * row.tokens)


def _fit(rows: Sequence[Measured], device: Device, source: str, large_from: int) -> Calibration:
    # Hops are counted for the ring alone: which all-reduce is faster would depend on the unknowns.
    start = Calibration(gpu=device.name, large_pass_tokens=large_from, one_shot_max_bytes=0)
    amounts = np.array([_amounts(_work(row, device, start), device) for row in rows])
    measured = np.array([row.seconds for row in rows])
    is_prefill = np.array([row.role is Role.PREFILL for row in rows])
    floor_s = _floor_s(rows)
    unknowns = _solve(amounts, measured, is_prefill, floor_s)
    told = [bool(column.any()) for column in amounts.T]
    values = zip(_NAMES, _settings(unknowns), told, strict=True)
    return start.model_copy(
        update={
            **{name: value for name, value, is_told in values if is_told},
            "overhead_per_step_us": 0.0,
            "prefill_floor_us": round(floor_s * 1e6, 3),
            "source": source,
        }
    )


def _solve(
    amounts: _Array, measured: _Array, is_prefill: NDArray[np.bool_], floor_s: float
) -> _Array:
    unknowns = _FIRST
    for _ in range(_TURNS):
        active = _bound(amounts, unknowns)
        # A prompt at the floor says nothing but the floor.
        told = ~is_prefill | (active @ unknowns > floor_s)
        if not told.any():
            break
        newer = _least_squares(active[told] / measured[told, None])
        unknowns = (unknowns + newer) / 2
    return unknowns


_NAMES = (
    "compute_efficiency",
    "memory_efficiency",
    "link_efficiency",
    "large_message_efficiency",
    "hop_us",
    "overhead_per_layer_us",
    "overhead_per_sequence_us",
)


def _settings(unknowns: _Array) -> list[float]:
    efficiencies = [round(float(1 / value), 4) for value in unknowns[:4]]
    return efficiencies + [round(float(value) * 1e6, 3) for value in unknowns[4:]]


def _work(row: Measured, device: Device, calibration: Calibration) -> Work:
    counter = PassCounter(row.shape, row.layout, links(device, calibration, row.shape))
    if row.role is Role.DECODE:
        return counter.decode(row.batch, row.batch * row.tokens)
    tokens = row.batch * row.tokens
    return counter.prefill(tokens, tokens * (row.tokens + 1) / 2, tokens)


def _amounts(work: Work, device: Device) -> list[float]:
    return [
        work.flops / device.flops_per_s,
        work.bytes / device.memory_bytes_per_s,
        work.near.bytes / device.link_bytes_per_s,
        work.near.large_bytes / device.link_bytes_per_s,
        work.near.hops,
        work.layers,
        work.sequences,
    ]


def _floor_s(rows: Sequence[Measured]) -> float:
    """Return the least time of a prompt, where one of twice the length takes hardly longer."""
    prompts = [row for row in rows if row.role is Role.PREFILL and row.batch == 1]
    flat = [
        short.seconds
        for short in prompts
        for long in prompts
        if (short.shape, short.layout) == (long.shape, long.layout)
        and long.tokens >= 2 * short.tokens
        and long.seconds <= 1.2 * short.seconds
    ]
    return min(flat, default=0.0)


def _bound(amounts: _Array, unknowns: _Array) -> _Array:
    """Leave each row only the longer of its arithmetic and its memory traffic."""
    by_memory = amounts[:, _COMPUTE] * unknowns[_COMPUTE] < amounts[:, _MEMORY] * unknowns[_MEMORY]
    active = amounts.copy()
    active[by_memory, _COMPUTE] = 0
    active[~by_memory, _MEMORY] = 0
    return active


def _least_squares(shares: _Array) -> _Array:
    """Solve for sums of 1 with every unknown at its least or above: drops the most negative."""
    rest = 1 - shares @ _LEAST
    columns = list(range(shares.shape[1]))
    above = np.zeros(shares.shape[1])
    while columns:
        solved, *_ = np.linalg.lstsq(shares[:, columns], rest, rcond=None)
        if (solved >= 0).all():
            above[columns] = solved
            break
        columns.pop(int(np.argmin(solved)))
    return _LEAST + above
