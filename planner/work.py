"""What one pass through the model is made of: operations, bytes, traffic. Pure; no times yet.

Counted for one rank that had every layer; with pp a stage has its share. Being linear in what a
calibration says, these amounts are also what one is fitted with.
"""

from dataclasses import dataclass

from planner.collectives import Link, Traffic, all_gather, all_to_all, point_to_point
from planner.layout import Layout
from planner.memory import rank_dense_parameters, rank_experts
from planner.shape import ModelShape

ACTIVATION_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of a rank in one pass; `near` and `far` are within a node and between nodes.

    `ring` goes by one of the two while `pair_flops`, those of attention's scores, are under way.
    """

    flops: float
    pair_flops: float
    bytes: float
    near: Traffic
    far: Traffic
    ring: Traffic
    ring_is_far: bool
    layers: int
    sequences: int = 0


@dataclass(frozen=True, kw_only=True)
class Links:
    """The ways between ranks: a group of more neighbours than a node has goes by the network."""

    near: Link
    far: Link
    devices_per_node: int

    def is_far(self, span: int) -> bool:
        """Whether so many neighbouring ranks are on several nodes."""
        return span > self.devices_per_node

    def between(self, span: int) -> Link:
        """Return the way that the slowest of so many neighbouring ranks take."""
        return self.far if self.is_far(span) else self.near


class PassCounter:
    """Counts passes of one model in one layout."""

    def __init__(
        self, shape: ModelShape, layout: Layout, links: Links, hotspot: float = 1.0
    ) -> None:
        self._shape = shape
        self._layout = layout
        self._links = links
        self._hotspot = hotspot

    def prefill(self, tokens: float, pairs: float, kv_tokens: float) -> Work:
        """Count a pass of prompts.

        Args:
            tokens: New ones, over all cp ranks.
            pairs: Of a new token and one that it looks at, itself included.
            kv_tokens: Cached and new ones that are looked at.
        """
        cp = self._layout.cp
        pair_flops = pairs / cp * self._shape.prefill_pair_flops
        return self._pass(tokens / cp, pair_flops, kv_tokens)

    def decode(self, batch: int, kv_tokens: float) -> Work:
        """Count a step of one dp rank's sequences; `kv_tokens` are cached for all of them."""
        pair_flops = kv_tokens * self._shape.decode_pair_flops
        return self._pass(batch, pair_flops, kv_tokens, sequences=batch)

    def mixed(self, tokens: float, pairs: float, batch: int, kv_tokens: float, seen: float) -> Work:
        """Count a step of one dp rank's sequences that has pieces of prompts beside them.

        Args:
            tokens: Of the pieces; `pairs` are of them alone, and `kv_tokens` of the sequences.
            seen: Cached and new tokens that the pieces look at.
        """
        shape = self._shape
        pair_flops = pairs * shape.prefill_pair_flops + kv_tokens * shape.decode_pair_flops
        return self._pass(tokens + batch, pair_flops, kv_tokens + seen, sequences=batch)

    def _pass(self, tokens: float, pair_flops: float, kv_tokens: float, sequences: int = 0) -> Work:
        shape, tp = self._shape, self._layout.tp
        head = shape.embedding_parameters / tp
        dense = rank_dense_parameters(shape, self._layout) + head
        expert_flops, expert_parameters = self._experts(tokens)
        kv_bytes = kv_tokens / self._layout.cp * self._rank_kv_bytes * shape.layers
        traffic = self._traffic(tokens)
        # Prefill takes logits of each prompt's last token only: the head's operations are few.
        linear = 2 * ((dense - head) * tokens + head * sequences)
        pair_flops *= shape.layers / tp
        return Work(
            flops=linear + expert_flops + pair_flops,
            pair_flops=pair_flops,
            bytes=(dense + expert_parameters) * shape.weight_bits / 8 + kv_bytes,
            near=traffic[False],
            far=traffic[True],
            ring=self._ring(kv_tokens),
            ring_is_far=self._links.is_far(tp * self._layout.cp),
            layers=shape.layers,
            sequences=sequences,
        )

    @property
    def _rank_kv_bytes(self) -> float:
        """Bytes that a rank has of one token in one layer."""
        shape = self._shape
        elements: float = shape.kv_elements
        if shape.latent is None:
            elements *= max(1.0, shape.kv_heads / self._layout.tp) / shape.kv_heads
        return elements * shape.kv_bits / 8

    def _experts(self, tokens: float) -> tuple[float, float]:
        """Return the operations of a rank's experts, and the parameters that it reads for them."""
        experts = self._shape.experts
        if experts is None:
            return 0.0, 0.0
        chosen = tokens * self._layout.dp * experts.top_k
        each = self._shape.expert_parameters * experts.layers
        flops = 2 * chosen * each / self._layout.expert_ranks * self._hotspot
        touched = 1 - (1 - experts.top_k / experts.count) ** (tokens * self._layout.dp)
        return flops, touched * rank_experts(self._shape, self._layout) * each

    def _traffic(self, tokens: float) -> dict[bool, Traffic]:
        """Return what tensor and expert parallel ranks send, by whether it leaves the node."""
        shape, layout, links = self._shape, self._layout, self._links
        stream = tokens * shape.hidden * ACTIVATION_BYTES
        sparse = shape.sparse_layers
        # A sparse layer's first sum is attention's; what it does besides is its dispatch.
        sums = all_reduces(shape.layers - sparse) + sparse
        total = {False: Traffic(), True: Traffic()}
        total[links.is_far(layout.tp)] += (
            links.between(layout.tp).all_reduce(stream, layout.tp) * sums
        )
        if sparse:
            total[links.is_far(layout.expert_span)] += self._dispatch(stream) * sparse
        return total

    def _dispatch(self, stream: float) -> Traffic:
        """Return how one sparse layer's tokens get to their experts and back."""
        layout, experts = self._layout, self._shape.experts
        link = self._links.between(layout.expert_span)
        if layout.ep == 1 or experts is None:
            return link.all_reduce(stream * layout.dp, layout.expert_ranks)
        # Each tp rank brings its part of the tokens on their way; the sums are gathered again.
        rows = stream / layout.tp * min(experts.top_k, layout.ep)
        large_from = link.large_message_bytes
        there = all_to_all(rows, layout.expert_ranks, large_from)
        return there * 2 + all_gather(stream, layout.tp, large_from)

    def _ring(self, kv_tokens: float) -> Traffic:
        """Return pass-KV round the ring (arXiv 2411.01783): each rank's K and V, cp - 1 hops."""
        layout = self._layout
        link = self._links.between(layout.tp * layout.cp)
        held = kv_tokens / layout.cp * self._rank_kv_bytes
        return point_to_point(held, link.large_message_bytes) * (
            (layout.cp - 1) * self._shape.layers
        )

    def stage_hop(self, tokens: float) -> Traffic:
        """Return what one stage sends the next one for so many tokens of a cp rank."""
        stream = tokens * self._shape.hidden * ACTIVATION_BYTES / self._layout.tp
        return point_to_point(stream)


def all_reduces(layers: int) -> int:
    """Return how often tp ranks add up in so many dense layers: after attention and the MLP."""
    return 2 * layers
