"""The seam of a whole decoding step: all layers of a rank in one call, where a device has that.

Legend: T tokens of the pass, D hidden size, M query and key heads, X = 2G cells of a token, E
experts, H head size, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
class RouterWeights:
    """What chooses the experts with the highest softmax; see RowKernels.route."""

    weight_ED: Tensor
    top_k: int
    normalise: bool


@dataclass(frozen=True, kw_only=True)
class SparseWeights:
    """What a router and its experts compute with; all experts are this rank's."""

    router: RouterWeights
    experts: Experts


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """What attention computes with. `qkv` are products whose outputs lie side by side.

    To all of these `bias` is added, where there is one, in the model's dtype.
    """

    qkv: Sequence[Product]
    bias: Tensor | None
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


@dataclass(frozen=True, kw_only=True)
class EndWeights:
    """What comes after the last layer; all of the head is this rank's."""

    norm: NormWeight
    head: Product


class Step(Protocol):
    """All layers of some weights, and the end where they had one. For one thread."""

    def __call__(
        self,
        x_TD: Tensor,
        rows: DecodeRows,
        slots_TX: Tensor,
        cos_T1H: Tensor,
        sin_T1H: Tensor,
        wanted_T: Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[Tensor | None, Mapping[str, float]]:
        """Run the fp32 residual stream of decoding sequences through all layers, in place.

        `rows` are all of the pass's rows; their K and V are written to the cache. `meanwhile` is
        called before the interpreter does nothing but wait. Returns the fp32 logits [T, V] of the
        rows in the order `wanted_T`, None where there is no end, and the seconds that parts have
        taken, by their names in engine.step_watch.
        """
        ...


# What makes it, or None where the layers' own kernels are to be used.
StepKernel = Callable[[Sequence[LayerWeights], EndWeights | None], Step | None]
