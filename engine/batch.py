"""Turns the chunks of one forward pass into the index tensors that every layer shares.

Owns the order of tokens in a pass and all indices into the cache. Pure but for making
tensors: nothing here is computed again in a layer.

Legend: T tokens of the pass, S sequences, B blocks of a table, G KV heads, X = 2G.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.decode_rows import DecodeRows
from engine.errors import BatchError
from engine.kvcache import KVCache
from engine.placed import placed

# Cached tokens that a group of last rows may gather at once: their sequences are a pass's, not few.
_LAST_TOKENS = 1 << 15
_ALONE = 1  # too few for a group of several


class Chunk(NamedTuple):
    """New tokens of one sequence: `start` tokens before them are already in the cache.

    `cp_first` is the cp rank that has the sequence's first tokens. `is_prompt` says that the tokens
    are a prompt's, however few: see `make_batch`.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int] | NDArray[np.int64]
    cp_first: int = 0
    is_prompt: bool = False

    @property
    def end(self) -> int:
        """How many of the sequence's tokens the cache holds after the pass."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class PrefillSpan:
    """Rows `begin` to `end` of the pass: tokens of one sequence after `start` others.

    `table` are the blocks of all of them.
    """

    begin: int
    end: int
    start: int
    table: NDArray[np.int64]
    cache: KVCache

    @cached_property
    def run_indices(self) -> Tensor | None:
        """Those of the `start` tokens; None where there are none."""
        blocks = -(-self.start // self.cache.block_size)
        return self.cache.run_indices(self.table[None, :blocks]) if blocks else None

    @cached_property
    def on_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """The table, and each row's first key and the end of the keys that it sees, all int32."""
        device, tokens = self.cache.tensor.device, self.end - self.begin
        table_B = placed(self.table.astype(np.int32), device)
        end_T = torch.arange(tokens, dtype=torch.int32, device=device) + (self.start + 1)
        return table_B, torch.zeros_like(end_T), end_T


@dataclass(frozen=True, kw_only=True)
class LastRows:
    """The chunks' last tokens, as if they alone were new: what the last layer needs to attend.

    `order_S` puts the chunks into the rows' order, `back_S` the rows into the chunks'.
    """

    rows: DecodeRows
    order_S: Tensor
    back_S: Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One pass: decode rows first, then prefill spans. `rows_of` is in the chunks' order.

    All positions are below `end`. `last` is None where there are no spans.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    end: int
    slot_mapping_TX: Tensor
    decode: DecodeRows
    prefill: tuple[PrefillSpan, ...]
    rows_of: tuple[slice, ...]
    last_rows_S: Tensor
    last: LastRows | None

    def with_tokens(self, token_ids: Sequence[int], vocab_size: int) -> "Batch":
        """Return the same pass with these tokens, one for each chunk, in place of its own.

        For chunks of one token; raises BatchError for a token that does not exist.
        """
        assert len(token_ids) == len(self.token_ids_T)
        ids_S = placed(_checked(token_ids, vocab_size), self.token_ids_T.device)
        return replace(
            self, token_ids_T=torch.empty_like(ids_S).scatter_(0, self.last_rows_S, ids_S)
        )


def make_batch(
    chunks: Sequence[Chunk], cache: KVCache, vocab_size: int, *, deterministic: bool = False
) -> Batch:
    """Lay out a pass. Raises BatchError where a chunk cannot be run with this cache.

    Chunks of one token are decode rows. With `deterministic` each of them is a group of its own,
    and those of prompts are spans: what a prompt gives does not depend on where it was cut.
    """
    if not chunks:
        raise BatchError("a pass needs at least one chunk")
    if all(len(chunk.token_ids) == 1 and not chunk.is_prompt for chunk in chunks):
        return _steps(chunks, cache, vocab_size, _ALONE if deterministic else None)
    tables = [block_table(chunk, cache.block_size, cache.num_blocks) for chunk in chunks]
    is_span = [len(chunk.token_ids) > 1 or (deterministic and chunk.is_prompt) for chunk in chunks]
    # Decode rows first, longest first, so that sequences of like length are slices of the pass.
    order = sorted(
        range(len(chunks)),
        key=lambda i: (is_span[i], -chunks[i].end),
    )
    token_ids_T = _checked([id for i in order for id in chunks[i].token_ids], vocab_size)
    positions_T = np.concatenate([np.arange(chunks[i].start, chunks[i].end) for i in order])
    blocks_T = np.concatenate(
        [tables[i][np.arange(chunks[i].start, chunks[i].end) // cache.block_size] for i in order]
    )
    rows_of = _rows(chunks, order)
    decode = [i for i in order if not is_span[i]]
    most_tokens = _ALONE if deterministic else None
    device = cache.tensor.device
    return Batch(
        token_ids_T=placed(token_ids_T, device),
        positions_T=placed(positions_T, device),
        end=max(chunk.end for chunk in chunks),
        slot_mapping_TX=cache.slot_mapping(blocks_T, positions_T % cache.block_size),
        decode=DecodeRows(
            lengths=[chunks[i].end for i in decode],
            tables=[tables[i] for i in decode],
            cache=cache,
            most_tokens=most_tokens,
        ),
        prefill=tuple(
            _prefill_span(chunks[i], tables[i], rows_of[i], cache) for i in order[len(decode) :]
        ),
        rows_of=rows_of,
        last_rows_S=placed(np.array([rows.stop - 1 for rows in rows_of]), device),
        last=_last_rows(chunks, tables, cache, most_tokens or _LAST_TOKENS)
        if len(decode) < len(chunks)
        else None,
    )


def _steps(
    chunks: Sequence[Chunk], cache: KVCache, vocab_size: int, most_tokens: int | None
) -> Batch:
    """Lay out a pass of decode rows alone, as most of a decode instance's are, array by array."""
    lengths_S = np.array([chunk.start for chunk in chunks], np.int64) + 1
    counts_S = -(-lengths_S // cache.block_size)
    order_S = np.argsort(-lengths_S, kind="stable")
    tables = [chunks[i].block_table[: counts_S[i]] for i in order_S]
    if lengths_S.min() < 1 or any(map(operator.ne, map(len, tables), counts_S[order_S])):
        for chunk in chunks:
            block_table(chunk, cache.block_size, cache.num_blocks)  # one is refused
    lengths_S = lengths_S[order_S]
    decode = DecodeRows(
        lengths=lengths_S.tolist(),
        tables=[np.asarray(table, np.int64) for table in tables],
        cache=cache,
        most_tokens=most_tokens,
    )
    _check_blocks(decode.blocks, cache.num_blocks)
    token_ids_S = _checked([chunks[i].token_ids[0] for i in order_S], vocab_size)
    positions_S = lengths_S - 1
    last_blocks_S = decode.blocks[decode.begins_S + positions_S // cache.block_size]
    rows_S = np.empty_like(order_S)
    rows_S[order_S] = np.arange(len(chunks))
    device = cache.tensor.device
    return Batch(
        token_ids_T=placed(token_ids_S, device),
        positions_T=placed(positions_S, device),
        end=decode.lengths[0],
        slot_mapping_TX=cache.slot_mapping(last_blocks_S, positions_S % cache.block_size),
        decode=decode,
        prefill=(),
        rows_of=tuple(map(slice, rows_S.tolist(), (rows_S + 1).tolist())),
        last_rows_S=placed(rows_S, device),
        last=None,
    )


def no_batch(cache: KVCache) -> Batch:
    """Return the pass of a dp rank that has no tokens while others have."""
    device = cache.tensor.device
    none = torch.empty(0, dtype=torch.int64, device=device)
    return Batch(
        token_ids_T=none,
        positions_T=none,
        end=0,
        slot_mapping_TX=none.view(0, cache.planes * cache.num_heads),
        decode=DecodeRows(lengths=(), tables=(), cache=cache),
        prefill=(),
        rows_of=(),
        last_rows_S=none,
        last=None,
    )


def token_ids(chunk: Chunk, vocab_size: int) -> NDArray[np.int64]:
    """Return the chunk's tokens; raises BatchError for one that does not exist."""
    return _checked(chunk.token_ids, vocab_size)


def _checked(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.int64]:
    ids = np.asarray(token_ids, np.int64)
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
    _check_blocks(table, num_blocks)
    return table


def _check_blocks(blocks: NDArray[np.int64], num_blocks: int) -> None:
    if blocks.min() < 0 or blocks.max() >= num_blocks:
        raise BatchError(f"a block table names a block outside the cache's {num_blocks}")


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
    return PrefillSpan(begin=rows.start, end=rows.stop, start=chunk.start, table=table, cache=cache)


def _last_rows(
    chunks: Sequence[Chunk],
    tables: Sequence[NDArray[np.int64]],
    cache: KVCache,
    most_tokens: int,
) -> LastRows:
    order = sorted(range(len(chunks)), key=lambda i: -chunks[i].end)
    order_S = placed(np.array(order), cache.tensor.device)
    return LastRows(
        rows=DecodeRows(
            lengths=[chunks[i].end for i in order],
            tables=[tables[i] for i in order],
            cache=cache,
            most_tokens=most_tokens,
        ),
        order_S=order_S,
        back_S=order_S.argsort(),
    )
