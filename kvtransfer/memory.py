"""Copies between a rank's KV memory and flat payloads.

Owns the payload's order and the arithmetic from global coordinates to blocks. Knows nothing of
grants: callers have checked that a copy is allowed.

Shapes: L layers, B blocks, N KV heads, S block size, D head size; U units of `unit` tokens.
Memory is [L, 2, B, N, S, D] (K=0, V=1); a payload is [L, 2, U, N, unit, D], so that with equal
block sizes whole blocks move as they lie.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer.layout import KVLayout, Span

# Elements are only moved, never computed with; numpy has no bfloat16, so their bits travel as
# integers. numpy rather than torch: its copies release the GIL and never start an OpenMP team
# beside the model's.
_BITS: dict[str, tuple[torch.dtype, torch.dtype, type[np.generic]]] = {
    "bfloat16": (torch.bfloat16, torch.int16, np.int16),
    "float16": (torch.float16, torch.int16, np.int16),
    "float32": (torch.float32, torch.int32, np.int32),
}
# Beyond this many separate extents one gather is cheaper than a copy for each.
_MANY_RUNS = 12


@dataclass(frozen=True, slots=True)
class BlockTable:
    """One sequence's blocks on this rank, in the order of the tokens that the rank holds."""

    ids: npt.NDArray[np.int64]
    held: tuple[Span, ...]

    def local(self, token: int) -> int:
        """Return where a global token stands among the tokens that this rank holds."""
        before = 0
        for span in self.held:
            if span.begin <= token <= span.end:
                return before + token - span.begin
            before += len(span)
        raise ValueError(f"token {token} is not held by this rank")


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring units of a payload that lie in neighbouring blocks."""

    units: Span
    blocks: Span
    subs: Span


class KVMemory:
    """One rank's KV tensor, addressed by global layers, heads and tokens."""

    def __init__(self, memory: torch.Tensor, layout: KVLayout, rank: int) -> None:
        """Wrap `memory` [L, 2, B, N, S, D] without copying; raises ValueError where it misfits."""
        shape, shard = layout.shape, layout.shard(rank)
        want = (len(shard.layers), 2, -1, len(shard.heads), layout.block_size, shape.head_size)
        found = tuple(memory.shape)
        if len(found) != 6 or any(w not in (-1, f) for w, f in zip(want, found, strict=True)):
            raise ValueError(f"KV memory is {found}; rank {rank} of the layout needs {want}")
        torch_type, bits_type, self._element = _BITS[shape.dtype]
        if memory.dtype != torch_type:
            raise ValueError(f"KV memory is {memory.dtype}; the layout says {shape.dtype}")
        if memory.device.type != "cpu" or not memory.is_contiguous():
            raise ValueError(f"KV memory must be contiguous host memory, found {memory.device}")
        self._kv: npt.NDArray[Any] = memory.detach().view(bits_type).numpy()
        self._layout = layout
        self._shard = shard

    @property
    def blocks(self) -> int:
        """Number of blocks in the memory."""
        return int(self._kv.shape[2])

    def table(self, block_ids: Sequence[int], total_tokens: int) -> BlockTable:
        """Check a sequence's block ids (of the tokens this rank holds) and make them a table.

        Raises ValueError for ids out of range, ids given twice, or too few of them.
        """
        held = self._layout.tokens_of(self._shard, total_tokens)
        ids = np.asarray(block_ids, dtype=np.int64)
        need = sum(-(-len(span) // self._layout.block_size) for span in held)
        if ids.ndim != 1 or len(ids) < need:
            raise ValueError(f"{len(block_ids)} blocks for {total_tokens} tokens, need {need}")
        if len(ids) and (ids.min() < 0 or ids.max() >= self.blocks):
            raise ValueError(f"block ids reach beyond the memory's {self.blocks} blocks")
        if len(np.unique(ids)) != len(ids):
            raise ValueError("a block id is given twice")
        return BlockTable(ids, held)

    def token_bytes(self, heads: Span) -> int:
        """Bytes of K and V of one token and layer, for a head range."""
        return 2 * len(heads) * self._layout.shape.head_size * self._layout.shape.element_bytes

    def payload_bytes(self, layers: Span, heads: Span, tokens: Span, unit: int) -> int:
        """Bytes of the payload of a box; a last, part-filled unit counts whole."""
        return len(layers) * -(-len(tokens) // unit) * unit * self.token_bytes(heads)

    def pack(
        self,
        payload: npt.NDArray[np.uint8],
        table: BlockTable,
        layers: Span,
        heads: Span,
        tokens: Span,
        unit: int,
    ) -> None:
        """Copy a box out of memory into `payload` (bytes); what lies beyond the tokens is zero."""
        out = self._shaped(payload, layers, heads, tokens, unit)
        ids, runs = self._where(table, tokens, unit)
        kv = self._box(layers, heads, unit)
        if runs is None:
            out[...] = kv[:, :, ids, 0]
        else:
            for run in runs:
                part = kv[:, :, run.blocks.begin : run.blocks.end, run.subs.begin : run.subs.end]
                out[:, :, run.units.begin : run.units.end].reshape(part.shape)[...] = part
        rest = len(tokens) % unit
        if rest:
            out[:, :, -1, :, rest:] = 0

    def scatter(
        self,
        payload: npt.NDArray[np.uint8],
        table: BlockTable,
        layers: Span,
        heads: Span,
        tokens: Span,
        unit: int,
    ) -> None:
        """Copy `payload` into the blocks of a box.

        After a part-filled last block the block's remainder is zeroed here and not taken from
        the payload: another sequence's bytes must not stay visible, whatever the sender wrote.
        """
        data = self._shaped(payload, layers, heads, tokens, unit)
        ids, runs = self._where(table, tokens, unit)
        kv = self._box(layers, heads, unit)
        if runs is None:
            kv[:, :, ids, 0] = data
        else:
            for run in runs:
                part = kv[:, :, run.blocks.begin : run.blocks.end, run.subs.begin : run.subs.end]
                part[...] = data[:, :, run.units.begin : run.units.end].reshape(part.shape)
        end = table.local(tokens.begin) + len(tokens)
        used = end % self._layout.block_size
        if used and end == sum(len(span) for span in table.held):
            rest = self._box(layers, heads, self._layout.block_size)
            rest[:, :, table.ids[end // self._layout.block_size], 0, :, used:] = 0

    def _box(self, layers: Span, heads: Span, unit: int) -> npt.NDArray[Any]:
        """Return the view [L, 2, B, units of a block, N, unit, D] of some layers and heads."""
        l0, h0 = self._shard.layers.begin, self._shard.heads.begin
        kv = self._kv[layers.begin - l0 : layers.end - l0]
        count, two, blocks, all_heads, block_size, size = kv.shape
        split = kv.reshape(count, two, blocks, all_heads, block_size // unit, unit, size)
        return split.transpose(0, 1, 2, 4, 3, 5, 6)[:, :, :, :, heads.begin - h0 : heads.end - h0]

    def _shaped(
        self,
        payload: npt.NDArray[np.uint8],
        layers: Span,
        heads: Span,
        tokens: Span,
        unit: int,
    ) -> npt.NDArray[Any]:
        units = -(-len(tokens) // unit)
        shape = (len(layers), 2, units, len(heads), unit, self._layout.shape.head_size)
        return payload.view(self._element).reshape(shape)

    def _where(
        self, table: BlockTable, tokens: Span, unit: int
    ) -> tuple[npt.NDArray[np.int64], list[_Run] | None]:
        """Return the tokens' blocks, and their extents; None where a gather is cheaper."""
        begin = table.local(tokens.begin)
        if begin % unit:
            raise ValueError(f"tokens {tokens} do not begin on a unit of {unit}")
        first, units = begin // unit, -(-len(tokens) // unit)
        ratio = self._layout.block_size // unit
        ids = table.ids[first // ratio : -(-(first + units) // ratio)]
        if ratio == 1 and np.count_nonzero(np.diff(ids) != 1) > _MANY_RUNS:
            return ids, None
        return ids, list(_runs(ids, first % ratio, units, ratio))


def _runs(ids: npt.NDArray[np.int64], first: int, units: int, ratio: int) -> Iterator[_Run]:
    """Cut local units [first, first + units) of `ids` into extents of whole or part blocks."""
    numbers: list[int] = ids.tolist()
    at, end = first, first + units
    while at < end:
        index, sub = divmod(at, ratio)
        block, stop = numbers[index], at + min(ratio - sub, end - at)
        count = 1
        if stop - at == ratio:
            while stop + ratio <= end and numbers[index + count] == block + count:
                count += 1
                stop += ratio
        subs = Span(sub, sub + stop - at) if count == 1 else Span(0, ratio)
        yield _Run(Span(at - first, stop - first), Span(block, block + count), subs)
        at = stop
