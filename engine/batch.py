"""Turns the chunks of one forward pass into the index tensors that every layer shares.

Owns the order of tokens in a pass and all indices into the cache. Pure but for making
tensors: nothing here is computed again in a layer.

Legend: T tokens of the pass, S sequences, B blocks of a table, L cached tokens (padded), G KV
heads, X = 2G.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import BatchError
from engine.kvcache import KVCache

# Padding that is worth another group of sequences: about what one more kernel call costs.
_PADDING_TOKENS = 512
# Cached tokens that a group of last rows may gather at once: their sequences are a pass's, not few.
_LAST_TOKENS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """New tokens of one sequence: `start` tokens before them are already in the cache.

    `cp_first` is the cp rank that has the sequence's first tokens.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    cp_first: int = 0

    @property
    def end(self) -> int:
        """How many of the sequence's tokens the cache holds after the pass."""
        return self.start + len(self.token_ids)


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
class PrefillSpan:
    """Rows `begin` to `end` of the pass: several tokens of one sequence after `start` others."""

    begin: int
    end: int
    start: int
    run_indices: Tensor | None  # of the `start` tokens; None where there are none


@dataclass(frozen=True, kw_only=True)
class LastRows:
    """The chunks' last tokens, as if they alone were new: what the last layer needs to attend.

    `order_S` puts the chunks into the groups' order, `back_S` the groups' rows into the chunks'.
    """

    groups: tuple[DecodeGroup, ...]
    order_S: Tensor
    back_S: Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One pass: decode groups first, then prefill spans. `rows_of` is in the chunks' order.

    `last` is None where every chunk has one token.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slot_mapping_TX: Tensor
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillSpan, ...]
    rows_of: tuple[slice, ...]
    last_rows_S: Tensor
    last: LastRows | None


def make_batch(chunks: Sequence[Chunk], cache: KVCache, vocab_size: int) -> Batch:
    """Lay out a pass. Raises BatchError where a chunk cannot be run with this cache."""
    if not chunks:
        raise BatchError("a pass needs at least one chunk")
    tables = [block_table(chunk, cache.block_size, cache.num_blocks) for chunk in chunks]
    # Decode rows first, longest first, so that groups of like length are slices of the pass.
    order = sorted(
        range(len(chunks)),
        key=lambda i: (len(chunks[i].token_ids) > 1, -chunks[i].end),
    )
    token_ids_T = np.concatenate([token_ids(chunks[i], vocab_size) for i in order])
    positions_T = np.concatenate([np.arange(chunks[i].start, chunks[i].end) for i in order])
    blocks_T = np.concatenate(
        [tables[i][np.arange(chunks[i].start, chunks[i].end) // cache.block_size] for i in order]
    )
    rows_of = _rows(chunks, order)
    decode = [i for i in order if len(chunks[i].token_ids) == 1]
    device = cache.tensor.device
    return Batch(
        token_ids_T=torch.from_numpy(token_ids_T).to(device),
        positions_T=torch.from_numpy(positions_T).to(device),
        slot_mapping_TX=cache.slot_mapping(blocks_T, positions_T % cache.block_size),
        decode=_decode_groups([chunks[i].end for i in decode], [tables[i] for i in decode], cache),
        prefill=tuple(
            _prefill_span(chunks[i], tables[i], rows_of[i], cache) for i in order[len(decode) :]
        ),
        rows_of=rows_of,
        last_rows_S=torch.tensor([rows.stop - 1 for rows in rows_of], device=device),
        last=_last_rows(chunks, tables, cache) if len(decode) < len(chunks) else None,
    )


def no_batch(cache: KVCache) -> Batch:
    """Return the pass of a dp rank that has no tokens while others have."""
    device = cache.tensor.device
    none = torch.empty(0, dtype=torch.int64, device=device)
    return Batch(
        token_ids_T=none,
        positions_T=none,
        slot_mapping_TX=none.view(0, 2 * cache.num_heads),
        decode=(),
        prefill=(),
        rows_of=(),
        last_rows_S=none,
        last=None,
    )


def token_ids(chunk: Chunk, vocab_size: int) -> NDArray[np.int64]:
    """Return the chunk's tokens; raises BatchError for one that does not exist."""
    ids = np.asarray(chunk.token_ids, np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise BatchError(f"a token id is outside the vocabulary of {vocab_size}")
    return ids


def block_table(chunk: Chunk, block_tokens: int, num_blocks: int) -> NDArray[np.int64]:
    """Return the blocks that the chunk's tokens, old and new, are in.

    Raises BatchError for a chunk without tokens, and where blocks are missing or do not exist.
    """
    if not chunk.token_ids or chunk.start < 0:
        raise BatchError(f"a chunk of {len(chunk.token_ids)} tokens from {chunk.start} on")
    needed = -(-chunk.end // block_tokens)
    table = np.asarray(chunk.block_table[:needed], np.int64)
    if len(table) < needed:
        raise BatchError(f"{chunk.end} tokens need {needed} blocks; the table has {len(table)}")
    if table.min() < 0 or table.max() >= num_blocks:
        raise BatchError(f"a block table names a block outside the cache's {num_blocks}")
    return table


def _rows(chunks: Sequence[Chunk], order: Sequence[int]) -> tuple[slice, ...]:
    rows = [slice(0)] * len(chunks)
    begin = 0
    for i in order:
        end = begin + len(chunks[i].token_ids)
        rows[i] = slice(begin, end)
        begin = end
    return tuple(rows)


def _prefill_span(
    chunk: Chunk, table: NDArray[np.int64], rows: slice, cache: KVCache
) -> PrefillSpan:
    prefix_blocks = -(-chunk.start // cache.block_size)
    return PrefillSpan(
        begin=rows.start,
        end=rows.stop,
        start=chunk.start,
        run_indices=cache.run_indices(table[None, :prefix_blocks]) if prefix_blocks else None,
    )


def _last_rows(
    chunks: Sequence[Chunk], tables: Sequence[NDArray[np.int64]], cache: KVCache
) -> LastRows:
    order = sorted(range(len(chunks)), key=lambda i: -chunks[i].end)
    lengths, sorted_tables = [chunks[i].end for i in order], [tables[i] for i in order]
    order_S = torch.tensor(order, device=cache.tensor.device)
    return LastRows(
        groups=_decode_groups(lengths, sorted_tables, cache, most_tokens=_LAST_TOKENS),
        order_S=order_S,
        back_S=order_S.argsort(),
    )


def _decode_groups(
    lengths: Sequence[int],
    tables: Sequence[NDArray[np.int64]],
    cache: KVCache,
    most_tokens: int | None = None,
) -> tuple[DecodeGroup, ...]:
    """Split sequences, longest first, where the padding to the longest would cost too much.

    Also before a group of several gathers more than `most_tokens`.
    """
    groups = []
    begin, padding = 0, 0
    for end in range(1, len(lengths) + 1):
        if end < len(lengths):
            padding += lengths[begin] - lengths[end]
            gathered = lengths[begin] * (end + 1 - begin)
            if padding <= _PADDING_TOKENS and (most_tokens is None or gathered <= most_tokens):
                continue
        groups.append(_decode_group(begin, lengths[begin:end], tables[begin:end], cache))
        begin, padding = end, 0
    return tuple(groups)


def _decode_group(
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
