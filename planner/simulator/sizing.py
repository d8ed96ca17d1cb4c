"""Makes a setup of layouts, a model and a device; refuses what cannot be. Pure.

Owns the words in which instances are asked for, as `4xtp2`.
"""

import re
from dataclasses import dataclass

from planner.calibration import Calibration
from planner.costs import RooflineCosts
from planner.errors import PlannerError
from planner.hardware import Device
from planner.layout import Layout, Role, refusal
from planner.memory import Memory, memory
from planner.options import GIB
from planner.shape import ModelShape
from planner.simulator.setup import Decodes, Prefills
from planner.simulator.tabled import TabledCosts

_DEGREES = {Role.PREFILL: ("cp", "tp", "pp"), Role.DECODE: ("tp", "pp", "dp", "ep")}
_WORDS = re.compile(r"([1-9]\d*)x((?:(?:cp|tp|pp|ep|dp)[1-9]\d*)+)")


class SetupError(PlannerError):
    """What is to be simulated cannot be; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Instances:
    """So many instances of a layout."""

    count: int
    layout: Layout

    @property
    def devices(self) -> int:
        """Devices of all of them."""
        return self.count * self.layout.ranks


def parse_instances(text: str, role: Role) -> Instances:
    """Read `2xtp4pp2`: two instances of tp 4 and pp 2. Raises SetupError."""
    degrees = _DEGREES[role]
    match = _WORDS.fullmatch(text)
    named = re.findall(r"([a-z]{2})(\d+)", match[2]) if match else []
    names = [name for name, _ in named]
    if match is None or len(set(names)) < len(names) or not set(names) <= set(degrees):
        raise SetupError(
            f"{text!r} names no {role.value} instances; write how many and their layout, as 2xtp4, "
            f"with {', '.join(degrees)}"
        )
    layout = Layout(**{name: int(degree) for name, degree in named})
    return Instances(count=int(match[1]), layout=layout)


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """What instances are of, and how full they may be."""

    shape: ModelShape
    device: Device
    calibration: Calibration
    reserve: float = 0.1

    def prefills(self, wanted: Instances, *, max_batched_tokens: int) -> Prefills:
        """Return a prefill pool. Raises SetupError where it cannot be had."""
        layout = wanted.layout
        tokens = max_batched_tokens * layout.cp
        held = self._held(layout, tokens)
        return Prefills(
            costs=self._costs(layout, max_batched_tokens),
            instances=wanted.count,
            kv_tokens=held.kv_tokens,
            max_batched_tokens=tokens,
            cp=layout.cp,
        )

    def decodes(
        self, wanted: Instances, *, max_batch: int, chunk_tokens: int | None = None
    ) -> Decodes:
        """Return a decode pool, or a colocated one. Raises SetupError where it cannot be had."""
        if chunk_tokens is not None and chunk_tokens <= max_batch:
            raise SetupError(
                f"--chunk-tokens is {chunk_tokens}, which the sequences of --max-batch {max_batch} "
                "may take alone; raise it, or lower --max-batch"
            )
        layout = wanted.layout
        held = self._held(layout, chunk_tokens or max_batch)
        return Decodes(
            costs=self._costs(layout, chunk_tokens or max_batch),
            instances=wanted.count,
            kv_tokens=held.kv_tokens * layout.dp,
            max_batch=max_batch,
            max_sequences=max_batch * layout.dp,
            dp=layout.dp,
            chunk_tokens=chunk_tokens,
        )

    def _costs(self, layout: Layout, pass_tokens: int) -> TabledCosts:
        return TabledCosts(
            RooflineCosts(
                shape=self.shape,
                layout=layout,
                device=self.device,
                calibration=self.calibration,
                pass_tokens=pass_tokens,
            )
        )

    def _held(self, layout: Layout, pass_tokens: int) -> Memory:
        held = memory(
            self.shape,
            layout,
            device_bytes=self.device.memory_bytes,
            reserve=self.reserve,
            pass_tokens=pass_tokens,
        )
        reason = refusal(self.shape, layout)
        if reason is None and held.kv_tokens < 1:
            reason = (
                f"weights need {held.weights / GIB:.1f} GiB a device and activations "
                f"{held.activations / GIB:.1f}, of {(held.device - held.reserve) / GIB:.1f}"
            )
        if reason is not None:
            raise SetupError(
                f"{self.shape.name} cannot be had with {layout.name} on {self.device.name}: "
                f"{reason}; choose another layout"
            )
        return held
