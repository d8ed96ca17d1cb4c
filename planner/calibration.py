"""How much of a device's best is reached, and what a pass costs beside. Owns these files' format.

A calibration is measured on one machine with one engine; `planner.fit` makes one from rows. Without
one, `assumed` has round figures for an engine that launches little from the host.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, ValidationError

from planner.errors import HardwareError

FOLDER = Path(__file__).with_name("calibrations")

_Efficiency = Annotated[float, Field(gt=0, le=1)]


class Calibration(BaseModel):
    """Shares of the peaks, and times beside them.

    Attributes:
        model: The model it was measured with, where it is good for that one only.
        large_pass_tokens: What a message has of further tokens moves at an efficiency of its own.
        one_shot_max_bytes: Up to here an all-reduce may send everything to everyone at once.
        hop_us: One hop within a node; the hardware table's where it is left out.
        overhead_per_layer_us: Of a pass, for each layer that it goes through.
        overhead_per_sequence_us: Of a decode step, for each of its sequences.
        prefill_floor_us: What a prompt takes at least, however short.
        hotspot: Load of the busiest rank of experts over the mean.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    model: str | None = None
    source: str = ""
    compute_efficiency: _Efficiency = 0.6
    memory_efficiency: _Efficiency = 0.8
    link_efficiency: _Efficiency = 0.7
    large_message_efficiency: _Efficiency = 0.7
    large_pass_tokens: Annotated[float, Field(gt=0)] = 2048
    network_efficiency: _Efficiency = 0.8
    one_shot_max_bytes: NonNegativeFloat = 512 * 2**10
    hop_us: NonNegativeFloat | None = None
    overhead_per_step_us: NonNegativeFloat = 500.0
    overhead_per_layer_us: NonNegativeFloat = 10.0
    overhead_per_sequence_us: NonNegativeFloat = 5.0
    prefill_floor_us: NonNegativeFloat = 0.0
    hotspot: Annotated[float, Field(ge=1)] = 1.0


def assumed(gpu: str) -> Calibration:
    """Return round figures that nobody measured."""
    return Calibration(gpu=gpu, source="assumed, not measured")


def shipped() -> dict[str, Path]:
    """Return the calibrations that come with the package, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.json"))}


def read_calibration(name: str, gpu: str, model: str) -> Calibration:
    """Return a calibration by its file or the name of a shipped one.

    Raises HardwareError where it cannot be read, or is for another device or model.
    """
    path = shipped().get(name, Path(name))
    try:
        calibration = Calibration.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as exc:
        known = ", ".join(shipped())
        raise HardwareError(
            f"calibration {name}: {exc.strerror}; give a file, or one of {known}"
        ) from exc
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        where = ".".join(map(str, error["loc"])) or "content"
        raise HardwareError(f"calibration {path}: {where}: {error['msg']}") from exc
    except ValueError as exc:
        raise HardwareError(f"calibration {path}: cannot be read as JSON: {exc}") from exc
    if calibration.gpu != gpu:
        raise HardwareError(
            f"calibration {name} is for {calibration.gpu}, the plan for {gpu}; leave it out or "
            "measure one"
        )
    if calibration.model not in (None, model):
        raise HardwareError(
            f"calibration {name} is for the model {calibration.model}, the plan for {model}; "
            "leave it out or measure one"
        )
    return calibration


def hotspot_ratio(loads: Sequence[float]) -> float:
    """Return the largest load over the mean: how much longer a step waits for its busiest rank."""
    return max(loads) * len(loads) / sum(loads)
