"""The memory that holds every sequence's keys and values. Owns one tensor; knows no sequences.

Legend: L layers, B blocks, G KV heads of this rank, H head size, T tokens, X = 2G (the K
heads, then the V heads), or X = 1 where a token has one latent instead.

One block of one layer is head-major, [G, block_size, H], so that a range of heads of a block
is contiguous for a transfer. For compute the same memory is seen as rows: `cells` has one row
of H elements for each (K or V, block, head, place in the block), `runs` one row of
block_size * H for each (K or V, block, head). Indices into either are made once for a batch
and serve every layer.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import ModelConfig
from engine.parallel import Layout
from engine.placed import placed

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]


class KVCache:
    """Keys and values of `num_blocks` blocks of `block_size` tokens, of all layers of a rank.

    `cells` and `runs` are by the layer's number in the model. There are two planes, keys and values
    of `value_size` elements; or one of latents, whose first `value_size` elements are the value.
    """

    def __init__(
        self,
        *,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int,
        block_size: int,
        layout: Layout,
        allocate: Allocate | None = None,
    ) -> None:
        """`allocate` gives zeroed memory, where it is to be of a special kind."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a cache of {num_blocks} blocks of {block_size} tokens is empty")
        heads = layout.kv_part(config.num_kv_heads)
        self.layers = layers = layout.layers(config.num_layers)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_heads = heads.stop - heads.start
        self.planes = config.kv_planes
        self.value_size = config.head_size if config.latent is None else config.latent.rank
        block = (self.num_heads, block_size, config.head_size)
        shape = (len(layers), self.planes, num_blocks, *block)
        # Zeros, not empty: a stray NaN in a block's unwritten tail would pass through a mask.
        if allocate is None:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        else:
            self.tensor = allocate(shape, dtype)
        cells = self.tensor.view(len(layers), -1, config.head_size)
        runs = self.tensor.view(len(layers), -1, block_size * config.head_size)
        self.cells = dict(zip(layers, cells, strict=True))
        self.runs = dict(zip(layers, runs, strict=True))

    def slot_mapping(self, blocks_T: NDArray[np.int64], places_T: NDArray[np.int64]) -> Tensor:
        """Return each token's cells, [T, X], from its block and its place in the block."""
        cells_T = blocks_T * (self.num_heads * self.block_size) + places_T
        return placed(cells_T[:, None] + self._head_cells_X(), self.tensor.device)

    def run_indices(self, block_tables_SB: NDArray[np.int64]) -> Tensor:
        """Return the runs of S sequences' blocks, [2 * S * G * B], in the order K/V, S, G, B.

        For a cache of keys and values.
        """
        heads_G = np.arange(self.num_heads)
        runs_SGB = block_tables_SB[:, None, :] * self.num_heads + heads_G[:, None]
        runs_2SGB = np.stack((runs_SGB, runs_SGB + self.num_blocks * self.num_heads))
        return placed(runs_2SGB.reshape(-1), self.tensor.device)

    def _head_cells_X(self) -> NDArray[np.int64]:
        keys_G = np.arange(self.num_heads) * self.block_size
        plane = self.num_blocks * self.num_heads * self.block_size
        return np.concatenate([keys_G + i * plane for i in range(self.planes)])

    @staticmethod
    def block_bytes(
        config: ModelConfig, dtype: torch.dtype, block_size: int, layout: Layout
    ) -> int:
        """Return the bytes that one block takes over all layers of a rank: of one with the most,
        since all ranks have as many blocks.
        """
        heads = layout.kv_part(config.num_kv_heads)
        cells: int = layout.most_layers(config.num_layers) * (heads.stop - heads.start) * block_size
        return cells * config.kv_planes * config.head_size * dtype.itemsize
