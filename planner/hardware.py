"""What devices can do at their best. Owns the table; efficiencies are a calibration's matter."""

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from planner.errors import HardwareError

_TABLE = Path(__file__).with_name("hardware.toml")
_SHORT = {"a100": "a100-80gb", "h100-80gb": "h100", "cpu": "cpu-2core"}


class Device(BaseModel):
    """One device and its way to others.

    `link` is between devices of a node, `network` between nodes; both in one direction, a device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    flops_per_s: PositiveFloat
    memory_bytes: PositiveFloat
    memory_bytes_per_s: PositiveFloat
    link_bytes_per_s: PositiveFloat
    link_latency_s: PositiveFloat
    devices_per_node: PositiveInt
    network_bytes_per_s: PositiveFloat
    network_latency_s: PositiveFloat
    source: str


def devices() -> dict[str, Device]:
    """Return all devices of the table by name."""
    tables = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    return {name: Device(name=name, **values) for name, values in tables.items()}


def find_device(name: str) -> Device:
    """Return a device by its name, whatever the case. Raises HardwareError listing the names."""
    known = devices()
    asked = name.lower()
    found = known.get(_SHORT.get(asked, asked))
    if found is None:
        raise HardwareError(f"no device {name!r} is known; use one of {', '.join(known)}")
    return found
