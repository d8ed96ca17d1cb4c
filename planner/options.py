"""What can be had of each layout: what its ranks hold, and what rate its instances sustain. Pure.

Owns the question that a plan answers, and why a layout cannot be had. Splits are
`planner.search`'s.
"""

from dataclasses import dataclass

from planner.calibration import Calibration
from planner.costs import RooflineCosts
from planner.hardware import Device
from planner.layout import Layout, Role, layouts, refusal
from planner.memory import Memory, memory
from planner.pools import DecodePool, Pool, PrefillPool, Slo
from planner.shape import ModelShape
from planner.workload import Workload

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned."""

    shape: ModelShape
    device: Device
    devices: int
    workload: Workload
    slo: Slo
    calibration: Calibration
    reserve: float = 0.1
    pass_tokens: int = 2048
    max_batch: int = 256

    def costs(self, layout: Layout) -> RooflineCosts:
        """Return the predicted times of an instance."""
        return RooflineCosts(
            shape=self.shape,
            layout=layout,
            device=self.device,
            calibration=self.calibration,
            pass_tokens=self.pass_tokens,
        )

    def memory(self, role: Role, layout: Layout) -> Memory:
        """Return what a rank holds."""
        of_prefill = role is Role.PREFILL
        return memory(
            self.shape,
            layout,
            device_bytes=self.device.memory_bytes,
            reserve=self.reserve,
            pass_tokens=self.pass_tokens * layout.cp if of_prefill else self.max_batch,
        )


@dataclass(frozen=True, kw_only=True)
class Option:
    """One layout of a role: what it holds, and what it gives or why it cannot be had.

    Attributes:
        goodput: Of 1, 2, ... instances; empty where it cannot be had.
    """

    role: Role
    layout: Layout
    memory: Memory
    reason: str | None = None
    pool: Pool | None = None
    goodput: tuple[float, ...] = ()
    fits: bool = False

    @property
    def kv_tokens(self) -> int:
        """Tokens that an instance has room for."""
        return self.memory.kv_tokens * self.layout.dp


def options(question: Question, role: Role) -> list[Option]:
    """Return every layout of a role that so many devices may have."""
    sparse = question.shape.experts is not None
    return [_option(question, role, at) for at in layouts(role, question.devices, sparse)]


def _option(question: Question, role: Role, layout: Layout) -> Option:
    held = question.memory(role, layout)
    reason = refusal(question.shape, layout) or _too_large(question, role, layout, held)
    if reason is not None:
        return Option(role=role, layout=layout, memory=held, reason=reason)
    pool = _pool(question, role, layout, held)
    reason = pool.too_slow()
    counts = range(1, question.devices // layout.ranks + 1)
    goodput = () if reason else tuple(pool.goodput(count) for count in counts)
    if reason is None and min(goodput) <= 0:
        # Just as many are in time as must be while nobody waits: any rate is too high.
        reason, goodput = f"{question.slo.share_of_each:.0%} are in time only without any load", ()
    return Option(
        role=role,
        layout=layout,
        memory=held,
        reason=reason,
        pool=pool,
        goodput=goodput,
        fits=True,
    )


def _too_large(question: Question, role: Role, layout: Layout, held: Memory) -> str | None:
    if held.kv <= 0:
        return (
            f"weights need {held.weights / GIB:.1f} GiB a device and activations "
            f"{held.activations / GIB:.1f}, of {(held.device - held.reserve) / GIB:.1f}"
        )
    workload = question.workload
    longest = workload.longest_prompt if role is Role.PREFILL else workload.longest
    if held.kv_tokens < longest:
        return f"KV has room for {held.kv_tokens:,} tokens, the longest request has {longest:,}"
    return None


def _pool(question: Question, role: Role, layout: Layout, held: Memory) -> Pool:
    costs = question.costs(layout)
    if role is Role.PREFILL:
        return PrefillPool(costs, question.workload, question.slo)
    return DecodePool(
        costs,
        question.workload,
        question.slo,
        kv_tokens=held.kv_tokens * layout.dp,
        max_batch=question.max_batch * layout.dp,
    )
