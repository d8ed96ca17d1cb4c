"""The seam of a whole decoding step: all layers of a rank in one call, where a device has that.

Legend: T tokens of the pass, D hidden size, M query and key heads, X = 2G cells of a token, E
experts, H head size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.decode_rows import DecodeRows
from engine.kernels.experts import Experts
from engine.kernels.rows import NormWeight

# Beyond as many rows, the single kernels' own calls are a small part of a step.
STEP_ROWS = 64
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class DenseWeights:
    """What a dense MLP computes with: gate above up, then down."""

    gate_up: Product
    down: Product


@dataclass(frozen=True, kw_only=True)
class SparseWeights:
    """What a router and its experts compute with; all experts are this rank's."""

    router_ED: Tensor
    experts: Experts
    top_k: int
    normalise: bool


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """What attention computes with. `qkv` are products whose outputs lie side by side."""

    qkv: Sequence[Product]
    qk_norm: NormWeight
    out: Product


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer, `number` in the model."""

    number: int
    attention_norm: NormWeight
    attention: AttentionWeights
    mlp_norm: NormWeight
    mlp: DenseWeights | SparseWeights


# Runs the fp32 residual stream [T, D] of decoding sequences through all layers, in place, and
# writes their K and V to the cache: (stream, rows, slots [T, X], cosines and signed sines
# [T, 1, H]). `rows` are all of the pass's rows. Returns the seconds that parts of it have taken, by
# their names in engine.step_watch.
Step = Callable[[Tensor, DecodeRows, Tensor, Tensor, Tensor], Mapping[str, float]]
# What makes it, or None where the layers' own kernels are to be used.
StepKernel = Callable[[Sequence[LayerWeights]], Step | None]
