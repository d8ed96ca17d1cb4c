"""Computes the steps that the worker decides on, and says what of them the transfer may send.

Owns the way from a step to the model's passes. Decides nothing, and knows no request beyond its id:
requests, blocks and sampling are the worker's.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.cache_memory import CacheMemory
from engine.pipeline import Logits
from engine.runner import Chunk, ModelRunner
from engine.sampling import Sampled, SequenceState, sample, sample_apart
from kvtransfer import KVShape, Span
from prefill.handoff import Handoff

log = logging.getLogger(__name__)

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
    """Runs steps on all ranks of an instance."""

    @property
    def depth(self) -> int:
        """How many steps may be under way at once: as many as there are stages."""
        ...

    def run(self, pieces: Sequence[Piece], done: Callable[[Tensor], None]) -> None:
        """Compute a step and hand its KV over as it is done; for the engine's thread.

        Returns when another step may begin. `done` gets the logits after each piece, [S, V] in
        fp32, step after step, from any thread.
        """
        ...

    def sample(self, logits_SV: Tensor, states: Sequence[SequenceState]) -> list[Sampled]:
        """Choose a token for each row of a step's logits."""
        ...


class Steps:
    """All ranks' part in every step; see Compute.

    Args:
        own: This rank's, the first one's.
        depth: How many stages there are.
        tell: Tells the other ranks of a step.
        on_fatal: Called where the logits of a step are lost.
    """

    def __init__(
        self,
        own: "RankCompute",
        *,
        depth: int = 1,
        tell: Callable[[Sequence[Piece]], None] = lambda _: None,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.depth = depth
        self._own = own
        self._tell = tell
        self._on_fatal = on_fatal
        # Of steps that other stages have yet to come to; None ends the thread that waits for them.
        self._under_way: queue.SimpleQueue[tuple[Logits, Callable[[Tensor], None]] | None]
        self._under_way = queue.SimpleQueue()
        if depth > 1:
            threading.Thread(target=self._collect, name="prefill-logits", daemon=True).start()

    def run(self, pieces: Sequence[Piece], done: Callable[[Tensor], None]) -> None:
        """See Compute."""
        self._tell(pieces)
        logits = self._own.run(pieces)
        if self.depth == 1:
            done(logits.wait())
        else:
            self._under_way.put((logits, done))

    def sample(self, logits_SV: Tensor, states: Sequence[SequenceState]) -> list[Sampled]:
        """See Compute."""
        if self._own.deterministic:
            return sample_apart(sample, logits_SV, states)
        return sample(logits_SV, states)

    def close(self) -> None:
        """Let go of the steps that are under way."""
        self._under_way.put(None)

    def _collect(self) -> None:
        while (item := self._under_way.get()) is not None:
            logits, done = item
            try:
                done(logits.wait())
            except BaseException as error:
                log.exception("the logits of a step are lost")
                self._on_fatal(error)
                return


class RankCompute:
    """One rank's part in every step."""

    def __init__(
        self,
        runner: ModelRunner,
        memory: CacheMemory,
        shape: KVShape,
        layers: range,
        handoff: Handoff,
    ) -> None:
        """`layers` are this rank's of the model's."""
        self._runner = runner
        self._memory = memory
        self._shape = shape
        self._layers = layers
        self._handoff = handoff
        self.deterministic = runner.deterministic

    def run(self, pieces: Sequence[Piece]) -> Logits:
        """Compute this rank's part; only an instance's first rank gets logits."""
        chunks = [
            Chunk(
                token_ids=piece.token_ids,
                start=piece.start,
                block_table=piece.blocks,
                cp_first=piece.cp_first,
                is_prompt=True,
            )
            for piece in pieces
        ]
        return self._runner.start(chunks, self._hand_over(pieces))

    def _hand_over(self, pieces: Sequence[Piece]) -> Callable[[int], None]:
        """What to do when a layer of the step is in the cache."""
        sending = [(piece.request_id, piece.tokens) for piece in pieces if piece.transfer]
        stride = layers_at_once(self._shape, sum(len(tokens) for _, tokens in sending))
        first, after = self._layers.start, self._layers.stop
        # Of all pieces: what is not sent now may be, to requests that share the prefix.
        blocks = [block for piece in pieces for block in self._blocks_of(piece)]

        def hand_over(layers: Span) -> None:
            for request_id, tokens in sending:
                self._handoff.ready(request_id, layers, tokens)

        def on_layer(layer: int) -> None:
            done = layer + 1 - first
            if done % stride and layer + 1 != after:
                return
            layers = Span(first + (done - 1) // stride * stride, layer + 1)
            self._memory.save(range(layers.begin, layers.end), blocks)
            self._memory.then(lambda: hand_over(layers))

        return on_layer

    def _blocks_of(self, piece: Piece) -> Sequence[int]:
        """Return the blocks of this rank's cache that the step writes to."""
        tokens, size = piece.tokens, self._runner.block_tokens
        blocks = piece.blocks[tokens.begin // size : -(-tokens.end // size)]
        return self._runner.local_blocks(blocks)


def layers_at_once(shape: KVShape, tokens: int) -> int:
    """How many layers of so many tokens to hand over together: 1 for long chunks, all for short."""
    token_bytes = shape.planes * shape.kv_heads * shape.head_size * shape.element_bytes
    layer_bytes = token_bytes * max(1, tokens)
    return min(shape.layers, -(-_WORTH_SENDING_BYTES // layer_bytes))
