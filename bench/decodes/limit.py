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
    return 2 * config.num_layers * config.num_kv_heads * config.head_size


def _weights(config: ModelConfig, experts: float) -> float:
    hidden = config.hidden_size
    heads = config.num_heads * config.head_size
    kv_heads = 2 * config.num_kv_heads * config.head_size
    attention = hidden * (heads + kv_heads) + heads * hidden
    mlps = sum(_mlp(config, layer, experts) for layer in range(config.num_layers))
    return config.num_layers * attention + mlps + hidden * config.vocab_size


def _mlp(config: ModelConfig, layer: int, experts: float) -> float:
    hidden = config.hidden_size
    if config.moe is None or not config.moe.is_sparse(layer):
        return 3 * hidden * config.intermediate_size
    return hidden * config.moe.num_experts + experts * 3 * hidden * config.moe.intermediate_size
