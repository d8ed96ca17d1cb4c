"""A model's sizes, and what follows from them: parameters, KV bytes, arithmetic. Pure.

Owns counting; knows nothing of layouts, devices or files. Norms and biases are left out: they are
less than a thousandth of any model here.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Sparse MLPs: `layers` of the model's layers have them, the others have a dense MLP.

    Attributes:
        inner: Inner size of one expert.
        shared_inner: Inner size of all experts together that every token goes through.
    """

    count: int
    top_k: int
    inner: int
    layers: int
    shared_inner: int = 0


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one small vector is cached.

    Attributes:
        q_rank: Rank of the queries' projection; 0 where they are projected at once.
        nope_size: Elements of a head's query and key that carry no position.
        value_size: Elements of a head's value.
    """

    kv_rank: int
    q_rank: int
    rope_size: int
    nope_size: int
    value_size: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of one model, from a config.json or by hand.

    Attributes:
        mlp_matrices: 3 where a gate is beside the MLP's two matrices, 2 where there is none.
        weight_bits: Of a weight; 4, 8 and 16 are usual.
        kv_bits: Of an element of the cache.
        runs_here: Whether this project's engine computes the architecture with such weights.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocab: int
    mlp_matrices: int = 3
    tied: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    weight_bits: float = 16
    kv_bits: float = 16
    runs_here: bool = False

    @property
    def sparse_layers(self) -> int:
        """Layers with experts."""
        return self.experts.layers if self.experts else 0

    @property
    def has_dense_mlp(self) -> bool:
        """Whether some layer has an MLP that is not made of experts."""
        return self.sparse_layers < self.layers

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        if self.latent is None:
            kv = 2 * self.kv_heads * self.head_size
            return self.hidden * (2 * self.heads * self.head_size + kv)
        mla = self.latent
        query = self.heads * (mla.nope_size + mla.rope_size)
        queries = mla.q_rank * (self.hidden + query) if mla.q_rank else self.hidden * query
        down = self.hidden * (mla.kv_rank + mla.rope_size)
        up = mla.kv_rank * self.heads * (mla.nope_size + mla.value_size)
        return queries + down + up + self.heads * mla.value_size * self.hidden

    @property
    def mlp_parameters(self) -> int:
        """Of one dense layer's MLP."""
        return self.mlp_matrices * self.hidden * self.inner

    @property
    def expert_parameters(self) -> int:
        """Of one expert of one layer."""
        return self.mlp_matrices * self.hidden * self.experts.inner if self.experts else 0

    @property
    def shared_parameters(self) -> int:
        """Of a sparse layer: its router, and the experts that every token goes through."""
        if self.experts is None:
            return 0
        shared = self.mlp_matrices * self.experts.shared_inner
        return self.hidden * (shared + self.experts.count)

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding; the head has as many, and is the same where they are tied."""
        return self.vocab * self.hidden

    @property
    def dense_parameters(self) -> int:
        """Of all layers, without the routed experts, the embedding and the head."""
        dense_layers = self.layers - self.sparse_layers
        return (
            self.layers * self.attention_parameters
            + dense_layers * self.mlp_parameters
            + self.sparse_layers * self.shared_parameters
        )

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        experts = self.experts.count * self.expert_parameters if self.experts else 0
        ends = self.embedding_parameters * (1 if self.tied else 2)
        return self.dense_parameters + self.sparse_layers * experts + ends

    @property
    def weight_bytes(self) -> float:
        """Bytes of the whole model's weights."""
        return weight_bytes(self.parameters, self.weight_bits)

    @property
    def kv_elements(self) -> int:
        """Elements that one layer caches for one token."""
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rope_size
        return 2 * self.kv_heads * self.head_size

    @property
    def kv_token_bytes(self) -> float:
        """Bytes that all layers cache for one token."""
        return self.layers * self.kv_elements * self.kv_bits / 8

    @property
    def prefill_pair_flops(self) -> int:
        """Operations of one layer for a query and a key that it looks at, keys as projected."""
        if self.latent is None:
            return 4 * self.heads * self.head_size
        mla = self.latent
        return 2 * self.heads * (mla.nope_size + mla.rope_size + mla.value_size)

    @property
    def decode_pair_flops(self) -> int:
        """The same in decode, where latent attention works on the latent vector itself."""
        if self.latent is None:
            return self.prefill_pair_flops
        return 2 * self.heads * (2 * self.latent.kv_rank + self.latent.rope_size)


def weight_bytes(parameters: float, bits: float) -> float:
    """Return the bytes of so many weights."""
    return parameters * bits / 8


def devices_needed(needed_bytes: float, device_bytes: float, reserve: float) -> int:
    """Return how many devices hold so many bytes when each keeps a share of itself free."""
    return math.ceil(needed_bytes / (device_bytes * (1 - reserve)))
