"""The rows of a pass that are one new token of a sequence each, and where their keys are.

Owns three forms of the same, each made only where it is asked for: tables as they are, which
compiled attention reads the cache by; those as tensors on the device, for a GPU's; and groups of
like length to be gathered.

Legend: S sequences, B blocks of a table, L cached tokens (padded), G KV heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kvcache import KVCache
from engine.placed import placed

# Padding that is worth another group of sequences: about what one more kernel call costs.
_PADDING_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class DecodeGroup:
    """Rows `begin` to `end` of the pass: one new token each, of sequences of similar length.

    Their cached keys and values are gathered to [2, S, G, L, H] by `run_indices`. Cells past
    a sequence's length hold whatever was there: `stale` are their rows in the gathered
    memory, which must be zeroed, and `mask_S11L` is -inf there. Both None where all are full.
    """

    begin: int
    end: int
    length: int
    run_indices: Tensor
    stale: Tensor | None
    mask_S11L: Tensor | None


@dataclass(frozen=True, kw_only=True)
class DecodeRows:
    """The first rows of the pass, one for each sequence; the longest first.

    Attributes:
        lengths: Keys of each, that of its new token included.
        tables: The blocks of each, as many as its keys need.
        most_tokens: What a group of several sequences may gather at once; None: anything.
    """

    lengths: Sequence[int]
    tables: Sequence[NDArray[np.int64]]
    cache: KVCache
    most_tokens: int | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def lengths_S(self) -> NDArray[np.int64]:
        """The lengths as one array."""
        return np.array(self.lengths, np.int64)

    @cached_property
    def blocks(self) -> NDArray[np.int64]:
        """All tables, one after another."""
        return np.concatenate(self.tables)

    @cached_property
    def begins_S(self) -> NDArray[np.int64]:
        """Where in `blocks` each table begins."""
        counts = [len(table) for table in self.tables]
        return np.cumsum([0, *counts[:-1]])

    @cached_property
    def on_device(self) -> tuple[Tensor, Tensor]:
        """The tables, [S, B] with zeros behind each, and the lengths, both int32."""
        tables_SB = np.zeros((len(self.tables), len(self.tables[0])), np.int32)
        for row, table in zip(tables_SB, self.tables, strict=True):
            row[: len(table)] = table
        device = self.cache.tensor.device
        return placed(tables_SB, device), placed(self.lengths_S.astype(np.int32), device)

    @cached_property
    def groups(self) -> tuple[DecodeGroup, ...]:
        """The rows split where the padding to the longest would cost too much.

        Also before a group of several gathers more than `most_tokens`.
        """
        lengths, most = self.lengths, self.most_tokens
        groups = []
        begin, padding = 0, 0
        for end in range(1, len(lengths) + 1):
            if end < len(lengths):
                padding += lengths[begin] - lengths[end]
                gathered = lengths[begin] * (end + 1 - begin)
                if padding <= _PADDING_TOKENS and (most is None or gathered <= most):
                    continue
            rows = slice(begin, end)
            groups.append(_group(begin, lengths[rows], self.tables[rows], self.cache))
            begin, padding = end, 0
        return tuple(groups)


def _group(
    begin: int,
    lengths: Sequence[int],
    tables: Sequence[NDArray[np.int64]],
    cache: KVCache,
) -> DecodeGroup:
    # Padding repeats block 0; its content is zeroed and masked after it was gathered.
    table_SB = np.zeros((len(tables), len(tables[0])), np.int64)
    for row, table in zip(table_SB, tables, strict=True):
        row[: len(table)] = table
    length = len(tables[0]) * cache.block_size
    stale_SL = np.arange(length) >= np.asarray(lengths)[:, None]
    stale, mask_S11L = None, None
    if stale_SL.any():
        sequences, places = np.nonzero(stale_SL)
        heads = np.arange(cache.num_heads)[:, None]
        keys = (sequences * cache.num_heads + heads) * length + places
        values = keys + len(tables) * cache.num_heads * length
        device = cache.tensor.device
        stale = torch.from_numpy(np.concatenate((keys, values), axis=None)).to(device)
        mask_S11L = torch.zeros(stale_SL[:, None, None].shape, dtype=cache.tensor.dtype)
        mask_S11L = mask_S11L.masked_fill_(
            torch.from_numpy(stale_SL[:, None, None]), -torch.inf
        ).to(device)
    return DecodeGroup(
        begin=begin,
        end=begin + len(lengths),
        length=length,
        run_indices=cache.run_indices(table_SB),
        stale=stale,
        mask_S11L=mask_S11L,
    )
