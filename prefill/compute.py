"""Computes the steps that the worker decides on, and says what of them the transfer may send.

Owns the way from a step to the model's passes on one rank. Decides nothing, and knows no request
beyond its id: requests, blocks and sampling are the worker's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.runner import Chunk, ModelRunner
from kvtransfer import KVShape, Span
from prefill.handoff import Handoff

# What is worth waking the transfer for: two staging slots. Less costs the compute more, by threads
# that compete for cores and the interpreter, than an earlier start gains the transfer.
_WORTH_SENDING_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens of one prompt that a step computes.

    Attributes:
        start: How many tokens before these are in the cache.
        blocks: The prompt's block table.
        transfer: Whether its KV goes to a decode instance.
        cp_first: The cp rank that has the prompt's first tokens.
    """

    request_id: int
    start: int
    token_ids: Sequence[int]
    blocks: Sequence[int]
    transfer: bool
    cp_first: int = 0

    @property
    def tokens(self) -> Span:
        """Where in the prompt the tokens are."""
        return Span(self.start, self.start + len(self.token_ids))


class Compute(Protocol):
    """Runs steps, on one rank or on all of an instance."""

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Compute a step and hand its KV over as it is done.

        Returns the logits after each piece, [S, V] in fp32. For the engine's thread.
        """
        ...


class RankCompute:
    """One rank's part in every step."""

    def __init__(self, runner: ModelRunner, shape: KVShape, handoff: Handoff) -> None:
        self._runner = runner
        self._shape = shape
        self._handoff = handoff

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """See Compute; only an instance's first rank gets logits."""
        chunks = [
            Chunk(
                token_ids=piece.token_ids,
                start=piece.start,
                block_table=piece.blocks,
                cp_first=piece.cp_first,
            )
            for piece in pieces
        ]
        return self._runner.forward(chunks, self._hand_over(pieces))

    def _hand_over(self, pieces: Sequence[Piece]) -> Callable[[int], None]:
        """What to do when a layer of the step is in the cache."""
        sending = [(piece.request_id, piece.tokens) for piece in pieces if piece.transfer]
        stride = layers_at_once(self._shape, sum(len(tokens) for _, tokens in sending))

        def on_layer(layer: int) -> None:
            end = layer + 1
            if end % stride and end != self._shape.layers:
                return
            layers = Span(layer // stride * stride, end)
            for request_id, tokens in sending:
                self._handoff.ready(request_id, layers, tokens)

        return on_layer


def layers_at_once(shape: KVShape, tokens: int) -> int:
    """How many layers of so many tokens to hand over together: 1 for long chunks, all for short."""
    layer_bytes = 2 * shape.kv_heads * shape.head_size * shape.element_bytes * max(1, tokens)
    return min(shape.layers, -(-_WORTH_SENDING_BYTES // layer_bytes))
