"""Which layouts there are, and which a model can have. Owns the planner's copy of the rules.

They are `engine.parallel.Layout`'s, which needs torch to be imported; a test holds them together.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from planner.shape import ModelShape


class Role(Enum):
    """What an instance does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of an instance; ranks are in the order dp, pp, cp, tp, the last one fastest."""

    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1

    @property
    def ranks(self) -> int:
        """Devices of an instance."""
        return self.cp * self.tp * self.pp * self.dp

    @property
    def expert_ranks(self) -> int:
        """Ranks that share the experts of a stage."""
        return self.dp * self.tp

    @property
    def expert_span(self) -> int:
        """Neighbouring ranks among which a stage's expert ranks are."""
        return self.ranks if self.dp > 1 else self.tp

    @property
    def name(self) -> str:
        """As the status of an instance has it: degrees above 1."""
        degrees = {"cp": self.cp, "tp": self.tp, "pp": self.pp, "ep": self.ep, "dp": self.dp}
        return " ".join(f"{key}{value}" for key, value in degrees.items() if value > 1) or "tp1"


def refusal(shape: ModelShape, layout: Layout) -> str | None:
    """Say why the engine would refuse this layout for this model; None where it would not."""
    heads, kv_heads, tp = shape.heads, shape.kv_heads, layout.tp
    shared_heads = shape.latent is None and kv_heads % tp and tp % kv_heads
    shared = shape.experts.shared_inner if shape.experts is not None else 0
    if heads % tp or shared_heads or shared % tp or (shape.has_dense_mlp and shape.inner % tp):
        return f"tp {tp} does not divide {heads} heads, {kv_heads} KV heads and the MLP"
    if layout.pp > shape.layers:
        return f"pp {layout.pp} needs as many layers; there are {shape.layers}"
    if layout.cp > 1 and (layout.ep > 1 or layout.dp > 1):
        return "cp goes with ep 1 and dp 1 only"
    if layout.expert_ranks % layout.ep:
        return f"ep {layout.ep} does not divide {layout.expert_ranks} ranks of dp x tp"
    experts = shape.experts
    if experts is None:
        return "there are no experts to split" if layout.ep > 1 else None
    if layout.ep > experts.count or experts.inner % (layout.expert_ranks // layout.ep):
        return f"ep {layout.ep} does not split {experts.count} experts of {experts.inner}"
    return None


def layouts(role: Role, devices: int, sparse: bool) -> Iterator[Layout]:
    """Yield the layouts of a role with at most so many devices, degrees being powers of two.

    Prefill has cp, tp and pp, decode tp, pp, dp and ep, as the commands do. A model without
    experts gains nothing from dp that more instances do not give.
    """
    powers = [1 << power for power in range(devices.bit_length())]
    for tp, pp, outer in itertools.product(powers, repeat=3):
        if outer * tp * pp > devices:
            continue
        if role is Role.PREFILL:
            yield Layout(cp=outer, tp=tp, pp=pp)
        elif sparse:
            for ep in powers:
                if ep <= outer * tp:
                    yield Layout(tp=tp, pp=pp, dp=outer, ep=ep)
        elif outer == 1:
            yield Layout(tp=tp, pp=pp)
