"""Runs a model on chunks of sequences. Owns the weights and the cache of one rank.

Does not decide what to run, does not own block ids, and does not sample. Not thread-safe:
one thread, the step loop's, calls it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.batch import Batch, Chunk, make_batch
from engine.config import ModelConfig
from engine.kvcache import Allocate, KVCache
from engine.layers.attention import Pass
from engine.layers.layer import Placement
from engine.models import MODELS
from engine.parallel import Alone, Collectives, Layout
from engine.weights import Progress, load_weights

__all__ = ["Chunk", "ModelRunner"]

OnLayer = Callable[[int], None]

_WARM_UP_TOKENS = (256, 16, 1)


class ModelRunner:
    """A loaded model with its cache.

    Raises WeightError where the weights do not fit the configuration, and UnsupportedError
    where the device has no kernels.
    """

    def __init__(
        self,
        *,
        folder: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int,
        block_size: int,
        layout: Layout | None = None,
        ranks: Collectives | None = None,
        progress: Progress | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        """With a layout of several ranks, `ranks` joins them: all must run the same passes."""
        layout = layout or Layout()
        layout.check(config)
        self.config = config
        with torch.inference_mode():
            placement = Placement(dtype=dtype, device=device, layout=layout, ranks=ranks or Alone())
            self._model = MODELS[config.architecture](config, placement)
            load_weights(
                folder, list(self._model.slots()), ignored=self._model.ignores, progress=progress
            )
            self._model.prepare()
        # Outside inference mode: transfers write into the cache from other threads.
        self.cache = KVCache(
            config=config,
            dtype=dtype,
            device=device,
            num_blocks=num_blocks,
            block_size=block_size,
            layout=layout,
            allocate=allocate,
        )

    def forward(self, chunks: Sequence[Chunk], on_layer: OnLayer | None = None) -> Tensor:
        """Compute the chunks, cache their K and V, and return the logits after each chunk.

        The result is [S, V] in fp32, in the chunks' order. `on_layer(l)` is called as soon as
        layer l's K and V of all chunks are in the cache. Raises BatchError before anything is
        written where a chunk cannot be run.
        """
        batch = self._batch(chunks)
        return self._run(batch, batch.last_rows_S, on_layer)

    def forward_all(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Do as `forward` does, and return the logits of every token: [T, V] for each chunk."""
        batch = self._batch(chunks)
        rows_T = torch.arange(len(batch.token_ids_T), device=batch.token_ids_T.device)
        logits_TV = self._run(batch, rows_T, None)
        return [logits_TV[rows] for rows in batch.rows_of]

    def warm_up(self) -> None:
        """Run passes of typical shapes, so that the first request does not pay for set-up.

        Writes into block 0 upwards and zeroes it again: call it before any sequence runs.
        """
        capacity = self.cache.num_blocks * self.cache.block_size
        for tokens in _WARM_UP_TOKENS:
            tokens = min(tokens, capacity)
            blocks = range(-(-tokens // self.cache.block_size))
            self.forward([Chunk(token_ids=[0] * tokens, start=0, block_table=blocks)])
            self.cache.tensor[:, :, : len(blocks)].zero_()

    @staticmethod
    def kv_block_bytes(
        config: ModelConfig, dtype: torch.dtype, block_size: int, layout: Layout | None = None
    ) -> int:
        """Return the bytes of one block over all layers, to size a cache from a memory budget."""
        return KVCache.block_bytes(config, dtype, block_size, layout or Layout())

    def _batch(self, chunks: Sequence[Chunk]) -> Batch:
        return make_batch(chunks, self.cache, self.config.vocab_size)

    @torch.inference_mode()
    def _run(self, batch: Batch, wanted_S: Tensor, on_layer: OnLayer | None) -> Tensor:
        shared = Pass(
            batch=batch,
            angles=self._model.rotary.angles(batch.positions_T),
            cache=self.cache,
            on_layer=on_layer,
        )
        return self._model(shared, wanted_S)
