"""One side of a prefill whose KV is handed over: the model runs at the sender.

`go` computes a prompt in the steps that a prefill instance takes; the move begins with the first
token. In mode "streamed" layers are handed over as an instance does it, in mode "afterwards" all at
once when the first token is there: that is what a transfer costs that nothing hides.
"""

import time
import zlib
from pathlib import Path
from typing import Any

import torch

from bench.movers.ours_side import AgentSide, Cache
from bench.movers.side import serve
from engine.config import load_config
from engine.runner import Chunk, ModelRunner
from kvtransfer import Span
from prefill.compute import layers_at_once
from prefill.config import PrefillConfig
from service.malloc import keep_freed_memory


class OverlapSide(AgentSide):
    """A side with a model at the sender."""

    def open(self, *, side: str, model: str = "", **options: Any) -> dict[str, Any]:
        """Make the agents, and at the sender the model on their memory."""
        torch.set_num_threads(1)
        keep_freed_memory()
        answer = super().open(side=side, **options)
        if self._source:
            memory = self._cache.memories[0]
            self._runner = ModelRunner(
                folder=Path(model),
                config=load_config(Path(model)),
                dtype=torch.bfloat16,
                device=torch.device("cpu"),
                num_blocks=memory.shape[2],
                block_size=memory.shape[4],
                allocate=lambda shape, dtype: memory,
            )
            self._runner.warm_up()
        return answer

    def prepare(
        self, *, number: int, mine: list[int], mode: str = "streamed", **_: Any
    ) -> dict[str, Any]:
        """Choose the round's blocks; open the grants."""
        self._mode = mode
        return super().prepare(number=number, mine=mine)

    def go(self) -> dict[str, Any]:
        """Compute the prompt; the answer also says how long that took and what the KV is."""
        tokens, layers = self._cache.tokens, self._cache.layout.groups[0].shape.layers
        step = PrefillConfig.model_fields["max_batched_tokens"].default
        started = time.monotonic()
        for begin in range(0, tokens, step):
            span = Span(begin, min(begin + step, tokens))
            chunk = Chunk(
                token_ids=[(7 * t + self._number) % 4096 for t in span],
                start=span.begin,
                block_table=self._chosen[0],
            )
            self._runner.forward([chunk], self._hand_over(span))
        began = time.monotonic()
        if self._mode == "afterwards":
            self._agents[0].ready(self._number, Span(0, layers), Span(0, tokens))
        stats = self._events.completed(self._number)
        return {
            "began": began,
            "compute_s": began - started,
            "hidden_bytes": stats.hidden_bytes,
            "bytes": stats.bytes,
            "sent": digest(self._cache, self._chosen[0]),
        }

    def _hand_over(self, span: Span) -> Any:
        shape = self._cache.layout.groups[0].shape
        stride = layers_at_once(shape, len(span))

        def on_layer(layer: int) -> None:
            end = layer + 1
            if self._mode == "streamed" and (end % stride == 0 or end == shape.layers):
                layers = Span(layer // stride * stride, end)
                self._agents[0].ready(self._number, layers, span)

        return on_layer

    def finish(self) -> dict[str, Any]:
        """Wait for the end; the answer also says what arrived."""
        answer = super().finish()
        return answer | {"arrived": digest(self._cache, self._chosen[0])}

    def check(self) -> dict[str, Any]:
        """The digests of both sides are compared where both are known."""
        return {}


def digest(cache: Cache, ids: tuple[int, ...]) -> int:
    """Return a checksum over a sequence's blocks in their order, whatever their numbers are."""
    part = cache.memories[0][:, :, list(ids)].contiguous()
    return zlib.crc32(part.view(torch.uint8).numpy().data)


if __name__ == "__main__":
    serve(OverlapSide())
