"""How long prefill, a decode step and a transfer take. Owns the seam that a simulator builds on.

`RooflineCosts` is a roofline (Williams et al., CACM 2009) for each pass: the longer of its
arithmetic and its memory traffic, then what ranks send each other, then what the host adds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from planner.calibration import Calibration
from planner.collectives import Link
from planner.hardware import Device
from planner.layout import Layout
from planner.memory import stage_layers
from planner.pipeline import utilisation
from planner.shape import ModelShape
from planner.work import ACTIVATION_BYTES, Links, PassCounter, Work


@dataclass(frozen=True)
class Chunk:
    """New tokens of one prompt, and how many of it are cached before them."""

    tokens: int
    context: int = 0


class Costs(Protocol):
    """Predicted seconds of one instance. Pure: the same answer whenever it is asked.

    A batch has one token, or one sequence, at least.
    """

    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        """From the start of a batch of prompts to their first tokens."""
        ...

    def prefill_busy_s(self, chunks: Sequence[Chunk]) -> float:
        """Until the next batch may start; with pp sooner than this one is done."""
        ...

    def decode_step_s(self, batch: int, context_tokens: float) -> float:
        """One token for each of `batch` sequences that have so many tokens cached, all together."""
        ...

    def mixed_step_s(self, chunks: Sequence[Chunk], batch: int, context_tokens: float) -> float:
        """The same, and pieces of prompts in one pass with them; `batch` may be 0."""
        ...

    def transfer_s(self, tokens: int) -> float:
        """Bring a prompt's whole KV to another node."""
        ...


class RooflineCosts:
    """See `Costs`; for one model, layout, device and calibration.

    `pass_tokens` is how many prompt tokens a pass has at most for each cp rank.
    """

    def __init__(
        self,
        *,
        shape: ModelShape,
        layout: Layout,
        device: Device,
        calibration: Calibration,
        pass_tokens: int = 2048,
    ) -> None:
        self._shape = shape
        self._layout = layout
        self._device = device
        self._calibration = calibration
        self._pass_tokens = pass_tokens
        self._links = links(device, calibration, shape)
        self._counter = PassCounter(shape, layout, self._links, calibration.hotspot)

    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        """See Costs."""
        stage_s, passes = self._stages(chunks)
        floor_s = self._calibration.prefill_floor_us * 1e-6
        return max(floor_s, stage_s * passes / utilisation(self._layout.pp, passes))

    def prefill_busy_s(self, chunks: Sequence[Chunk]) -> float:
        """See Costs."""
        stage_s, passes = self._stages(chunks)
        floor_s = self._calibration.prefill_floor_us * 1e-6
        return max(floor_s / self._layout.pp, stage_s * passes)

    def _stages(self, chunks: Sequence[Chunk]) -> tuple[float, int]:
        """Return the mean seconds of a stage in one pass, and how many passes there are."""
        tokens = sum(chunk.tokens for chunk in chunks)
        passes = math.ceil(tokens / (self._pass_tokens * self._layout.cp))
        pairs = sum(map(_pairs, chunks))
        # Each pass looks at what the ones before it have added, too: this is their mean.
        seen = sum(chunk.context + chunk.tokens * (passes + 1) / (2 * passes) for chunk in chunks)
        work = self._counter.prefill(tokens / passes, pairs / passes, seen)
        return self._stage_s(work, tokens / passes / self._layout.cp), passes

    def decode_step_s(self, batch: int, context_tokens: float) -> float:
        """See Costs."""
        layout = self._layout
        groups = layout.dp * layout.pp  # with pp as many groups take turns as there are stages
        rows = math.ceil(batch / groups)
        work = self._counter.decode(rows, context_tokens * rows / batch)
        return self._stage_s(work, rows) * layout.pp

    def mixed_step_s(self, chunks: Sequence[Chunk], batch: int, context_tokens: float) -> float:
        """See Costs. The pieces are spread evenly over dp ranks."""
        layout = self._layout
        rows = math.ceil(batch / (layout.dp * layout.pp))
        held = context_tokens * rows / batch if batch else 0.0
        tokens = sum(chunk.tokens for chunk in chunks) / layout.dp
        pairs = sum(map(_pairs, chunks)) / layout.dp
        seen = sum(chunk.context + chunk.tokens for chunk in chunks) / layout.dp
        work = self._counter.mixed(tokens, pairs, rows, held, seen)
        floor_s = self._calibration.prefill_floor_us * 1e-6 if chunks else 0.0
        return max(floor_s, self._stage_s(work, tokens + rows) * layout.pp)

    def _stage_s(self, work: Work, tokens: float) -> float:
        """Return the largest stage's share of a pass, and its hop to the next one."""
        layout = self._layout
        whole = seconds(work, self._device, self._calibration, self._links)
        share = whole * stage_layers(self._shape, layout) / self._shape.layers
        if layout.pp == 1:
            return share
        link = self._links.between(layout.ranks // layout.dp)
        return share + link.seconds(self._counter.stage_hop(tokens))

    def transfer_s(self, tokens: int) -> float:
        """See Costs."""
        holders = self._layout.ranks // self._layout.dp
        each = tokens * self._shape.kv_token_bytes / holders
        return self._links.far.latency_s + each / self._links.far.bytes_per_s


def _pairs(chunk: Chunk) -> float:
    """Return how many pairs there are of a new token and one that it looks at."""
    return chunk.tokens * (chunk.context + (chunk.tokens + 1) / 2)


def seconds(work: Work, device: Device, calibration: Calibration, ways: Links) -> float:
    """Return how long a pass takes on a rank that has every layer."""
    compute_s = work.flops / (device.flops_per_s * calibration.compute_efficiency)
    memory_s = work.bytes / (device.memory_bytes_per_s * calibration.memory_efficiency)
    host_us = (
        calibration.overhead_per_step_us
        + calibration.overhead_per_layer_us * work.layers
        + calibration.overhead_per_sequence_us * work.sequences
    )
    sent_s = ways.near.seconds(work.near) + ways.far.seconds(work.far)
    ring_s = (ways.far if work.ring_is_far else ways.near).seconds(work.ring)
    beside_s = work.pair_flops / (device.flops_per_s * calibration.compute_efficiency)
    sent_s += max(0.0, ring_s - beside_s)
    return max(compute_s, memory_s) + sent_s + host_us * 1e-6


def links(device: Device, calibration: Calibration, shape: ModelShape) -> Links:
    """Return the ways between ranks as they are with these efficiencies."""
    hop_us = calibration.hop_us
    near = Link(
        latency_s=device.link_latency_s if hop_us is None else hop_us * 1e-6,
        bytes_per_s=device.link_bytes_per_s * calibration.link_efficiency,
        large_bytes_per_s=device.link_bytes_per_s * calibration.large_message_efficiency,
        large_message_bytes=calibration.large_pass_tokens * shape.hidden * ACTIVATION_BYTES,
        one_shot_max_bytes=calibration.one_shot_max_bytes,
    )
    network = device.network_bytes_per_s * calibration.network_efficiency
    far = Link(
        latency_s=device.network_latency_s,
        bytes_per_s=network,
        large_bytes_per_s=network,
        large_message_bytes=float("inf"),
    )
    return Links(near=near, far=far, devices_per_node=device.devices_per_node)
