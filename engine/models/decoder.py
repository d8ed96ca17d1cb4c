"""A decoder-only transformer with pre-normalisation, whatever its MLPs are.

Owns the order of the layers and the residual stream, which is fp32 in any dtype.
Legend: T tokens of a pass, S rows whose logits are wanted, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from engine.config import ModelConfig
from engine.layers.attention import Attention, Pass
from engine.layers.embedding import Embedding, TiedHead
from engine.layers.layer import Layer, Placement
from engine.layers.linear import ColumnLinear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import Rotary
from engine.weights import WeightSlot

_HEAD = "lm_head"


class MLP(Layer, Protocol):
    """The second half of a decoder layer."""

    def __call__(self, x_TD: Tensor) -> Tensor: ...


MakeMLP = Callable[[int, str], MLP]  # layer, its place in the checkpoint


class DecoderLayer:
    """Attention and MLP, each with its norm before it."""

    def __init__(
        self, config: ModelConfig, layer: int, make_mlp: MakeMLP, placement: Placement
    ) -> None:
        name = f"model.layers.{layer}"
        size, eps = config.hidden_size, config.rms_norm_eps
        self._attention_norm = RMSNorm(f"{name}.input_layernorm", size, eps, placement)
        self._attention = Attention(config, layer, f"{name}.self_attn", placement)
        self._mlp_norm = RMSNorm(f"{name}.post_attention_layernorm", size, eps, placement)
        self._mlp = make_mlp(layer, f"{name}.mlp")

    def parts(self) -> Iterator[Layer]:
        yield from (self._attention_norm, self._attention, self._mlp_norm, self._mlp)

    def __call__(self, x_TD: Tensor, shared: Pass, wanted_S: Tensor | None) -> Tensor:
        """Return the residual stream after the layer; with `wanted_S`, of these rows only."""
        attended_TD = self._attention(self._attention_norm(x_TD), shared)
        if wanted_S is not None:
            x_TD, attended_TD = x_TD[wanted_S], attended_TD[wanted_S]
        x_TD += attended_TD
        x_TD += self._mlp(self._mlp_norm(x_TD))
        return x_TD


class Decoder:
    """The whole model of one rank. Call it with a pass to get the last layer's output."""

    def __init__(self, config: ModelConfig, make_mlp: MakeMLP, placement: Placement) -> None:
        vocab, hidden = config.vocab_size, config.hidden_size
        self._embedding = Embedding("model.embed_tokens", vocab, hidden, placement)
        self._layers = [
            DecoderLayer(config, layer, make_mlp, placement) for layer in range(config.num_layers)
        ]
        self._norm = RMSNorm("model.norm", hidden, config.rms_norm_eps, placement)
        self._head = (
            TiedHead(self._embedding, placement)
            if config.tie_word_embeddings
            else ColumnLinear(
                [(_HEAD, vocab, placement.layout.vocab_part(vocab))], hidden, placement
            )
        )
        self._vocab_size = vocab
        self._all_gather = placement.ranks.all_gather
        self.rotary = Rotary(config.head_size, config.rope_theta, placement.device)

    def slots(self) -> Iterator[WeightSlot]:
        for part in self._parts():
            yield from part.slots()

    def prepare(self) -> None:
        for part in self._parts():
            part.prepare()

    def ignores(self, tensor_name: str) -> bool:
        """Tell whether a checkpoint may hold this tensor although the model has no slot for it."""
        # Tied heads are often saved all the same; old checkpoints hold rotary constants.
        tied = isinstance(self._head, TiedHead) and tensor_name == f"{_HEAD}.weight"
        return tied or tensor_name.endswith(".rotary_emb.inv_freq")

    def __call__(self, shared: Pass, wanted_S: Tensor) -> Tensor:
        """Run a pass and return fp32 logits, [S, V], of the rows `wanted_S`."""
        x_TD = self._embedding(shared.token_ids_T)
        for layer in self._layers[:-1]:
            x_TD = layer(x_TD, shared, None)
        x_SD = self._layers[-1](x_TD, shared, wanted_S)
        return self._all_gather(self._head(self._norm(x_SD)), self._vocab_size).float()

    def _parts(self) -> Iterator[Layer]:
        yield self._embedding
        for layer in self._layers:
            yield from layer.parts()
        yield self._norm
        yield self._head
