"""Starting weights from which looking things up is learned in a minute instead of hours.

Owns the structure added to a fresh network's random weights; training changes all of it.
From random weights alone, a model of this size sits for thousands of steps at the loss of
guessing before it finds that one layer must gather near tokens and the next must match
them. The start gives it hints:

- all embeddings share one direction, and the heads of the first layer turn it into a
  preference for tokens a few places back (rotary phases that agree at that distance);
- a word's two tokens, bare and after a space, begin alike;
- in the layers above, queries resemble keys, so that like attends to like, and outputs
  resemble transposed values, so that what is attended to is copied ("Mimetic
  initialization of self-attention layers", Trockman and Kolter, 2023).
"""

import torch
from torch import Tensor

from launch.builtin.network import Attention, Network, NetworkConfig
from launch.builtin.tokenizer import SPACE, build_tokenizer

DISTANCES = (1, 3, 4, 6)  # of the first layer's heads: next word, and a code's digits
LOCAL_STRENGTH = 7.0  # about a window of three tokens
LOCAL_FREQUENCIES = 8  # the fastest rotary ones, which can tell near distances apart
MATCH_SHARE = 0.7
# A match must not depend on distance, so it starts in the slowly turning half of a head.
FAST_ROTARY_GAIN = 0.15


@torch.no_grad()
def apply_structured_start(network: Network, generator: torch.Generator) -> None:
    """Add the structure to `network`, whose weights must be fresh."""
    config = network.config
    direction = torch.randn(config.hidden_size, generator=generator)
    direction /= direction.norm()
    network.embed_tokens.weight.add_(direction)
    _resemble_bare_words(network.embed_tokens.weight)
    for index, layer in enumerate(network.layers):
        attention = layer.get_submodule("self_attn")
        assert isinstance(attention, Attention)
        if index == 0:
            _prefer_near(attention, config, direction)
            _resemble_values(attention, config, share=0.6, gain=1.0)
        else:
            _resemble_keys(attention, config)
            _resemble_values(attention, config, share=MATCH_SHARE, gain=0.3)


def _resemble_bare_words(embedding_VD: Tensor) -> None:
    """Start a word after a space near the same word without it, so that copies carry over."""
    vocab = build_tokenizer().get_vocab()
    for token, index in vocab.items():
        bare = vocab.get(token.removeprefix(SPACE))
        if bare is not None and bare != index and len(token) > 2:
            embedding_VD[index].lerp_(embedding_VD[bare], 0.7)


def _prefer_near(attention: Attention, config: NetworkConfig, direction: Tensor) -> None:
    """Let each head score highest at its distance, through the shared direction."""
    q_NHD = attention.q_proj.weight.view(-1, config.head_dim, config.hidden_size)
    k_GHD = attention.k_proj.weight.view(-1, config.head_dim, config.hidden_size)
    half, count = config.head_dim // 2, LOCAL_FREQUENCIES
    frequencies = config.rope_theta ** -(torch.arange(count) / half)
    scale = LOCAL_STRENGTH * (2 / config.hidden_size) ** 0.5
    key = torch.zeros(config.head_dim)
    key[:count] = scale * count**-0.5
    k_GHD += torch.outer(key, direction)
    for q_HD, distance in zip(q_NHD, DISTANCES, strict=True):
        query = torch.zeros(config.head_dim)
        query[:count] = scale * count**-0.5 * (frequencies * distance).cos()
        query[half : half + count] = -scale * count**-0.5 * (frequencies * distance).sin()
        q_HD += torch.outer(query, direction)


def _resemble_keys(attention: Attention, config: NetworkConfig) -> None:
    queries = attention.q_proj.weight
    keys = attention.k_proj.weight.view(-1, config.head_dim, config.hidden_size)
    fast = torch.arange(config.head_dim) % (config.head_dim // 2) < config.head_dim // 4
    keys[:, fast] *= FAST_ROTARY_GAIN
    keys = keys.repeat_interleave(attention.query_groups, dim=0).flatten(0, 1)
    queries.copy_(MATCH_SHARE * keys + (1 - MATCH_SHARE) * queries)


def _resemble_values(
    attention: Attention, config: NetworkConfig, share: float, gain: float
) -> None:
    outputs = attention.o_proj.weight
    values = attention.v_proj.weight.view(-1, config.head_dim, config.hidden_size)
    values = values.repeat_interleave(attention.query_groups, dim=0).flatten(0, 1)
    outputs.copy_(share * gain * values.T + (1 - share) * outputs)
