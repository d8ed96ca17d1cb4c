"""What the fullest rank of an instance holds: weights, activations, a reserve, and KV in the rest.

Pure. A rank of a layout is said to have the most layers and, with pp, the larger end of the model.
"""

import math
from dataclasses import dataclass

from planner.layout import Layout
from planner.shape import ModelShape

_ACTIVATION_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank; `kv_tokens` is of one dp rank: its sequences' tokens, all together."""

    device: float
    weights: float
    activations: float
    reserve: float
    kv_token: float

    @property
    def kv(self) -> float:
        """What is left for KV; below 0 where not even weights fit."""
        return self.device - self.weights - self.activations - self.reserve

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit into the rest."""
        return max(0, math.floor(self.kv / self.kv_token))


def memory(
    shape: ModelShape,
    layout: Layout,
    *,
    device_bytes: float,
    reserve: float,
    pass_tokens: int,
) -> Memory:
    """Return what a rank holds when a pass has so many tokens of one dp rank at most."""
    return Memory(
        device=device_bytes,
        weights=rank_weight_bytes(shape, layout),
        activations=_activation_bytes(shape, layout, pass_tokens),
        reserve=reserve * device_bytes,
        kv_token=rank_kv_token_bytes(shape, layout),
    )


def rank_weight_bytes(shape: ModelShape, layout: Layout) -> float:
    """Return the weights of the fullest rank."""
    layers = stage_layers(shape, layout)
    ends = shape.embedding_parameters * (1 if shape.tied or layout.pp > 1 else 2)
    parameters = layers / shape.layers * rank_dense_parameters(shape, layout) + ends / layout.tp
    if shape.experts is not None:
        sparse = min(layers, shape.sparse_layers)
        parameters += sparse * rank_experts(shape, layout) * shape.expert_parameters
    return parameters * shape.weight_bits / 8


def rank_dense_parameters(shape: ModelShape, layout: Layout) -> float:
    """Return a rank's part of all layers without routed experts, as if it had every layer."""
    split = shape.dense_parameters / layout.tp
    if shape.latent is not None or layout.tp <= shape.kv_heads:
        return split
    # Beyond one KV head for each rank, ranks hold the same ones.
    kv = 2 * shape.hidden * shape.kv_heads * shape.head_size * shape.layers
    return split - kv / layout.tp + kv / shape.kv_heads


def rank_experts(shape: ModelShape, layout: Layout) -> float:
    """Return how many experts' worth of weights the fullest rank has in a sparse layer."""
    if shape.experts is None:
        return 0.0
    part = math.ceil(shape.experts.count / layout.ep)
    return part * layout.ep / layout.expert_ranks


def rank_kv_token_bytes(shape: ModelShape, layout: Layout) -> float:
    """Return the bytes on a rank for one token of its dp rank's sequences."""
    elements: float = shape.kv_elements
    if shape.latent is None:
        elements = 2 * shape.head_size * max(1.0, shape.kv_heads / layout.tp)
    return stage_layers(shape, layout) * elements * shape.kv_bits / 8 / layout.cp


def stage_layers(shape: ModelShape, layout: Layout) -> int:
    """Return how many layers the largest stage has."""
    return math.ceil(shape.layers / layout.pp)


def _activation_bytes(shape: ModelShape, layout: Layout, pass_tokens: int) -> float:
    """Count what is alive in the widest part of a layer: the stream, its sum, a product's parts."""
    inner = shape.inner if shape.has_dense_mlp else 0
    if shape.experts is not None:
        inner = max(inner, shape.experts.top_k * shape.experts.inner)
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_size
    widest = max(2 * inner, heads) / layout.tp
    return pass_tokens / layout.cp * (3 * shape.hidden + widest) * _ACTIVATION_BYTES
