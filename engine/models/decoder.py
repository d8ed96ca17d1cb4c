"""A decoder-only transformer with pre-normalisation, whatever its MLPs are.

Owns the order of the layers and the residual stream, which is fp32 in any dtype. A rank has the
layers of its stage; the first stage has the embedding, the last one the head.
Legend: T tokens of a pass, t this rank's rows of its stream, S tokens whose logits are wanted, s
this rank's rows of theirs, D hidden size, V vocabulary.
"""

import re
from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from engine.config import ModelConfig
from engine.kernels import step_kernel
from engine.kernels.step import (
    STEP_ROWS,
    DenseWeights,
    EndWeights,
    LayerWeights,
    SparseWeights,
    Step,
)
from engine.layers.attention import Attention, Pass
from engine.layers.embedding import Embedding, TiedHead
from engine.layers.latent import LatentAttention
from engine.layers.layer import Layer, Placement
from engine.layers.linear import ColumnLinear
from engine.layers.moe import SparseMLP
from engine.layers.norm import RMSNorm
from engine.layers.rotary import Rotary
from engine.step_watch import ATTENTION, DENSE, EXPERTS, HEAD, REST
from engine.weights import WeightSlot

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens", "model.norm", "lm_head"
_OF_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class MLP(Layer, Protocol):
    """The second half of a decoder layer."""

    def weights(self) -> DenseWeights | SparseWeights | None:
        """Return what a step through all layers needs; None where it is not for one."""
        ...

    def __call__(self, x_TD: Tensor, most_rows: int) -> Tensor:
        """Return what becomes of rows, of which no dp rank has more than `most_rows`."""
        ...


MakeMLP = Callable[[int, str], MLP]  # layer, its place in the checkpoint


class DecoderLayer:
    """Attention and MLP, each with its norm before it."""

    def __init__(
        self, config: ModelConfig, layer: int, make_mlp: MakeMLP, placement: Placement
    ) -> None:
        name = f"model.layers.{layer}"
        self._number = layer
        size, eps = config.hidden_size, config.rms_norm_eps
        self._attention_norm = RMSNorm(f"{name}.input_layernorm", size, eps, placement)
        self._attention = _attention(config, layer, f"{name}.self_attn", placement)
        self._mlp_norm = RMSNorm(f"{name}.post_attention_layernorm", size, eps, placement)
        self._mlp = make_mlp(layer, f"{name}.mlp")
        self._stream = placement.stream
        self._watch = placement.watch
        self._mlp_part = EXPERTS if isinstance(self._mlp, SparseMLP) else DENSE

    def parts(self) -> Iterator[Layer]:
        yield from (self._attention_norm, self._attention, self._mlp_norm, self._mlp)

    def weights(self) -> LayerWeights | None:
        """Return what a step through all layers needs; None where it is not for one."""
        mlp, attention = self._mlp.weights(), self._attention.weights()
        if mlp is None or attention is None:
            return None
        return LayerWeights(
            number=self._number,
            attention_norm=self._attention_norm.norm,
            attention=attention,
            mlp_norm=self._mlp_norm.norm,
            mlp=mlp,
        )

    def __call__(
        self, x_tD: Tensor, more_tD: Tensor | None, shared: Pass, wanted_S: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Take and return the residual stream as two parts, of which the first may be written to.

        Their sum is left to the next norm. With `wanted_S`, return that of these tokens only.
        """
        stream, rows = self._stream, len(shared.token_ids_T)
        self._watch.to(ATTENTION)
        normed_TD = stream.whole(self._attention_norm(x_tD, more_tD), rows)
        attended_tD = self._attention(normed_TD, shared, wanted_S)
        self._watch.to(self._mlp_part)
        if wanted_S is not None:
            x_tD, rows = stream.pick(x_tD, rows, wanted_S), len(wanted_S)
        normed_TD = stream.whole(self._mlp_norm(x_tD, attended_tD), rows)
        return x_tD, self._mlp(normed_TD, shared.most_rows)


class Decoder:
    """The model of one rank. Call it with a pass to get what its stage makes of it.

    `sparse` are the stage's layers with experts, by number.
    """

    def __init__(self, config: ModelConfig, make_mlp: MakeMLP, placement: Placement) -> None:
        self.sparse: dict[int, SparseMLP] = {}
        self._numbers = placement.layout.layers(config.num_layers)
        self._num_layers = config.num_layers
        self._more = range(config.num_layers, config.num_layers + config.more_layers)
        self._is_tied = config.tie_word_embeddings
        is_first = self._numbers.start == 0
        is_last = self._numbers.stop == config.num_layers
        needs_embedding = is_first or (is_last and self._is_tied)
        self._embedding = _embedding(config, placement) if needs_embedding else None
        self._layers = [DecoderLayer(config, layer, make_mlp, placement) for layer in self._numbers]
        self._end = _End(config, self._embedding, placement) if is_last else None
        self._make_step = step_kernel(placement.device)
        self._is_alone = placement.layout.tp == 1
        self._watch = placement.watch
        self._step: Step | None = None
        self.rotary = Rotary(config.turned_size, config.rope, placement.device)

    def slots(self) -> Iterator[WeightSlot]:
        for part in self._parts():
            yield from part.slots()

    def prepare(self) -> None:
        for part in self._parts():
            part.prepare()
        if self._is_alone:
            weights = [layer.weights() for layer in self._layers]
            known = [each for each in weights if each is not None]
            if len(known) == len(weights):
                end = self._end.weights() if self._end is not None else None
                self._step = self._make_step(known, end)

    def ignores(self, tensor_name: str) -> bool:
        """Tell whether a checkpoint may hold this tensor although the model has no slot for it."""
        # Tied heads are often saved all the same; old checkpoints hold rotary constants.
        tied = self._is_tied and tensor_name == f"{_HEAD}.weight"
        constant = tensor_name.endswith(".rotary_emb.inv_freq")
        return tied or constant or self._is_of_another_rank(tensor_name)

    def _is_of_another_rank(self, tensor_name: str) -> bool:
        if found := _OF_LAYER.match(tensor_name):
            layer = int(found[1])
            if layer in self.sparse:
                return self.sparse[layer].ignores(tensor_name)
            is_elsewhere = layer < self._num_layers and layer not in self._numbers
            return is_elsewhere or layer in self._more
        if tensor_name == f"{_EMBEDDING}.weight":
            return self._embedding is None
        return self._end is None and tensor_name in (f"{_NORM}.weight", f"{_HEAD}.weight")

    def __call__(self, shared: Pass, wanted_S: Tensor, x_tD: Tensor | None) -> Tensor:
        """Run a pass and return the stream, [t, D], or from the last stage fp32 logits, [S, V].

        `x_tD` is the stream of the stage before; the first stage begins one. The logits are of the
        tokens `wanted_S`.
        """
        if x_tD is None:
            assert self._embedding is not None
            x_tD = self._embedding(shared.token_ids_T)
        if self._step is not None and _is_step(shared):
            assert shared.decode is not None
            cos_T1H, sin_T1H = shared.angles.cos_T1H, shared.angles.sin_T1H
            logits_SV, seconds = self._step(
                x_tD,
                shared.decode,
                shared.slot_mapping_TX,
                cos_T1H,
                sin_T1H,
                wanted_S,
                shared.meanwhile,
            )
            self._watch.move(seconds)
            return x_tD if logits_SV is None else logits_SV
        more_tD = None
        for layer in self._layers[:-1]:
            x_tD, more_tD = layer(x_tD, more_tD, shared, None)
        last = self._layers[-1]
        if self._end is None:
            x_tD, more_tD = last(x_tD, more_tD, shared, None)
            self._watch.to(REST)
            return x_tD.add_(more_tD)
        return self._end(*last(x_tD, more_tD, shared, wanted_S), len(wanted_S))

    def _parts(self) -> Iterator[Layer]:
        if self._embedding is not None:
            yield self._embedding
        for layer in self._layers:
            yield from layer.parts()
        if self._end is not None:
            yield from self._end.parts()


class _End:
    """What comes after the last layer: a norm, and the head."""

    def __init__(
        self, config: ModelConfig, embedding: Embedding | None, placement: Placement
    ) -> None:
        vocab, hidden = config.vocab_size, config.hidden_size
        self._norm = RMSNorm(_NORM, hidden, config.rms_norm_eps, placement)
        self._head: TiedHead | ColumnLinear
        if config.tie_word_embeddings:
            assert embedding is not None
            self._head = TiedHead(embedding, placement)
        else:
            part = placement.layout.ragged_part(vocab)
            self._head = ColumnLinear([(_HEAD, vocab, part)], hidden, placement)
        self._vocab_size = vocab
        self._whole = placement.stream.whole
        self._watch = placement.watch
        self._all_gather = placement.ranks.all_gather if placement.whole_logits else None

    def parts(self) -> Iterator[Layer]:
        yield self._norm
        yield self._head

    def weights(self) -> EndWeights:
        """Return what a step through all layers needs."""
        return EndWeights(norm=self._norm.norm, head=self._head.product)

    def __call__(self, x_sD: Tensor, more_sD: Tensor | None, rows: int) -> Tensor:
        self._watch.to(HEAD)
        x_SD = self._whole(self._norm(x_sD, more_sD), rows)
        logits_SW = self._head(x_SD)
        if self._all_gather is not None:
            logits_SW = self._all_gather(logits_SW, self._vocab_size)
        logits_SW = logits_SW.float()
        self._watch.to(REST)
        return logits_SW


def _attention(
    config: ModelConfig, layer: int, name: str, placement: Placement
) -> Attention | LatentAttention:
    if config.latent is not None:
        return LatentAttention(config, layer, name, placement)
    return Attention(config, layer, name, placement, is_last=layer == config.num_layers - 1)


def _is_step(shared: Pass) -> bool:
    rows = shared.decode
    return rows is not None and 0 < len(rows) <= STEP_ROWS and shared.on_layer is None


def _embedding(config: ModelConfig, placement: Placement) -> Embedding:
    return Embedding(_EMBEDDING, config.vocab_size, config.hidden_size, placement)
