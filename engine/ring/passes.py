"""A pass of the model over context-parallel ranks: each rank's rows, and attention over all.

Owns the way from an instance's chunks and blocks to one rank's tokens and cells of its cache, and
which variant of the ring a pass uses. Legend: T new tokens of this rank, L keys of this rank, S
chunks, N query heads, X = 2G (K heads, then V heads) or 1, H head size, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Chunk, block_table, token_ids
from engine.kvcache import KVCache
from engine.placed import placed
from engine.ring.choose import AttentionShape, Load, Variant, choose
from engine.ring.comm import Wire
from engine.ring.cyclic import Dealing
from engine.ring.ring import GatherKV, PassKV, PassQ, RingAttention
from engine.ring.shards import Part, RingPlan

_VARIANTS: Mapping[str, Callable[[Wire], RingAttention]] = {
    Variant.PASS_KV.value: PassKV,
    Variant.PASS_Q.value: PassQ,
    "gather": GatherKV,
}
AUTO = "auto"
MODES = (AUTO, *_VARIANTS)


@dataclass(frozen=True, kw_only=True)
class RingPass:
    """One rank's part of a pass.

    Attributes:
        token_ids_T: Its new tokens, chunk by chunk.
        last_rows: (chunk, row of T) of each chunk whose last token is this rank's.
        owners: By chunk, the rank that has the last token.
        key_cells: The cells of its keys, [L * X]; None where all are of this pass.
    """

    plan: RingPlan
    token_ids_T: Tensor
    positions_T: Tensor
    slot_mapping_TX: Tensor
    last_rows: tuple[tuple[int, int], ...]
    owners: tuple[int, ...]
    key_cells: Tensor | None


class Ring:
    """What one of several context-parallel ranks needs to run its part of a pass."""

    def __init__(self, wire: Wire, dealing: Dealing, cache: KVCache, mode: str = AUTO) -> None:
        """`mode` is one of MODES; `cache` holds this rank's blocks."""
        if mode not in MODES:
            raise ValueError(f"the ring's mode must be one of {', '.join(MODES)}; found {mode!r}")
        self._wire = wire
        self._dealing = dealing
        self._cache = cache
        self._mode = mode
        self._rings = {name: make(wire) for name, make in _VARIANTS.items()}

    @property
    def cache(self) -> KVCache:
        """This rank's blocks."""
        return self._cache

    def make_pass(self, chunks: Sequence[Chunk], vocab_size: int) -> RingPass:
        """Lay out this rank's part. Raises BatchError where a chunk cannot be run."""
        dealing, rank, cache = self._dealing, self._wire.rank, self._cache
        blocks = cache.num_blocks * cache.block_size // dealing.grain
        tables = [block_table(chunk, dealing.round, blocks) for chunk in chunks]
        plan = RingPlan(
            tuple(
                dealing.shards(chunk.start, len(chunk.token_ids), chunk.cp_first)
                for chunk in chunks
            )
        )
        parts = plan.queries[rank]
        mine = [
            token_ids(chunk, vocab_size)[part.at - chunk.start]
            for chunk, part in zip(chunks, parts, strict=True)
        ]
        last = [shards.place_of(shards.end - 1) for shards in plan.sequences]
        has_cached = any(chunk.start for chunk in chunks)
        device = cache.tensor.device
        return RingPass(
            plan=plan,
            token_ids_T=placed(np.concatenate(mine), device),
            positions_T=placed(np.concatenate([part.at for part in parts]), device),
            slot_mapping_TX=self._slots(parts, tables),
            last_rows=tuple(
                (number, parts[number].begin + row)
                for number, (owner, row) in enumerate(last)
                if owner == rank
            ),
            owners=tuple(owner for owner, _ in last),
            key_cells=self._slots(plan.keys[rank], tables).flatten() if has_cached else None,
        )

    def attention(self, made: RingPass, num_heads: int) -> Callable[[int, Tensor], Tensor]:
        """Return this pass's attention: (layer, [T, N + X, H]) to [T, N * H]."""
        ring = self._rings[self._variant(made, num_heads)]
        cache = self._cache

        def attend(layer: int, qkv_TNH: Tensor) -> Tensor:
            q_TNH, kv_TXH = qkv_TNH[:, :num_heads], qkv_TNH[:, num_heads:]
            if made.key_cells is not None:
                cells = cache.cells[layer].index_select(0, made.key_cells)
                heads, head_size = kv_TXH.shape[1:]
                kv_LXH = cells.view(len(cells) // heads, heads, head_size)
            else:
                kv_LXH = kv_TXH
            out_TNH = ring.attend(q_TNH.contiguous(), kv_LXH, made.plan)
            # Of a latent the first part is the value: what else comes out is no use.
            return out_TNH[:, :, : cache.value_size].flatten(1)

        return attend

    def collect(self, made: RingPass, mine_SV: Tensor) -> Tensor:
        """Bring the logits after each chunk, [S, V], to rank 0; others return none, [0, V]."""
        [tag] = self._wire.tags(1)
        if self._wire.rank:
            self._wire.send(mine_SV.contiguous(), 0, tag).wait()
            return mine_SV[:0]
        of_rank = {
            rank: [s for s, owner in enumerate(made.owners) if owner == rank]
            for rank in sorted(set(made.owners))
        }
        parts = {
            rank: mine_SV if rank == 0 else mine_SV.new_empty(len(chunks), mine_SV.shape[1])
            for rank, chunks in of_rank.items()
        }
        pending = [self._wire.receive(part, rank, tag) for rank, part in parts.items() if rank]
        for each in pending:
            each.wait()
        logits_SV = mine_SV.new_empty(len(made.owners), mine_SV.shape[1])
        for rank, chunks in of_rank.items():
            logits_SV[chunks] = parts[rank]
        return logits_SV

    def _slots(self, parts: Sequence[Part], tables: Sequence[NDArray[np.int64]]) -> Tensor:
        found = [
            self._dealing.cells(part.at, table, self._cache.block_size)
            for part, table in zip(parts, tables, strict=True)
        ]
        blocks, places = (np.concatenate(each) for each in zip(*found, strict=True))
        return self._cache.slot_mapping(blocks, places)

    def _variant(self, made: RingPass, num_heads: int) -> str:
        if self._mode != AUTO:
            return self._mode
        shape = AttentionShape(
            heads=num_heads,
            kv_heads=self._cache.num_heads,
            head_size=self._cache.tensor.shape[-1],
            element_bytes=self._cache.tensor.element_size(),
            planes=self._cache.planes,
        )
        loads = [Load(s.end - s.start, s.start) for s in made.plan.sequences]
        return choose(loads, shape, self._wire.size).value
