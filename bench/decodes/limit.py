"""The bytes that a step of a batch must read from memory. Pure.

Each weight once, whatever the batch, but of a sparse layer only the experts that some token has
chosen; keys and values of each sequence once. Nothing else is counted: no norms, no activations,
nothing that is written.
"""

from engine.config import ModelConfig


def step_bytes(
    config: ModelConfig,
    *,
    element_bytes: int,
    batch: int,
    cached_tokens: float,
    experts: float = 0.0,
) -> float:
    """Return the bytes of a step.

    Args:
        element_bytes: Of a weight and of a key's or value's element.
        cached_tokens: That each sequence looks at, on average.
        experts: Chosen by some token of the batch, on average over sparse layers.
    """
    elements = _weights(config, experts) + batch * cached_tokens * kv_elements(config)
    return elements * element_bytes


def kv_elements(config: ModelConfig) -> int:
    """Return the elements of a token's keys and values in all layers."""
    return config.kv_planes * config.num_layers * config.num_kv_heads * config.head_size


def _weights(config: ModelConfig, experts: float) -> float:
    mlps = sum(_mlp(config, layer, experts) for layer in range(config.num_layers))
    layers = config.num_layers * _attention(config) + mlps
    return layers + config.hidden_size * config.vocab_size


def _attention(config: ModelConfig) -> int:
    hidden, latent = config.hidden_size, config.latent
    if latent is None:
        heads = config.num_heads * config.head_size
        return 2 * hidden * (heads + config.num_kv_heads * config.head_size)
    queries = config.num_heads * latent.query_size
    of_queries = hidden * queries
    if latent.query_rank is not None:
        of_queries = latent.query_rank * (hidden + queries)
    per_head = latent.rank * (latent.plain_size + latent.value_size) + latent.value_size * hidden
    return of_queries + hidden * latent.cell_size + config.num_heads * per_head


def _mlp(config: ModelConfig, layer: int, experts: float) -> float:
    hidden = config.hidden_size
    if config.moe is None or not config.moe.is_sparse(layer):
        return 3 * hidden * config.intermediate_size
    inner = experts * config.moe.intermediate_size + config.moe.shared_size
    return hidden * config.moe.num_experts + 3 * hidden * inner
