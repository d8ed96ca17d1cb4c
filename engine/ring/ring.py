"""Attention of a pass whose tokens are spread over ranks. Owns the order of exchange and compute.

Legend: T new tokens of this rank, L keys of this rank, N query heads, G KV heads, X = 2G (the K
heads, then the V heads) or 1 where a token's key is its value as well, H head size.

Pass-KV: keys and values go round the ring, and each rank attends with its own queries. Pass-Q:
queries go round, and each rank sends what they make of its keys to where they came from. Either
way the next block is on its way while the present one is computed. See arXiv 2411.01783, section 3.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from engine.ring import block
from engine.ring.comm import Wire
from engine.ring.errors import RingError
from engine.ring.merge import Partial
from engine.ring.shards import RingPlan


class RingAttention(Protocol):
    """Causal attention of a pass's new tokens over all tokens of their sequences, on all ranks."""

    def attend(self, q_TNH: Tensor, kv_LXH: Tensor, plan: RingPlan) -> Tensor:
        """Return this rank's [T, N, H], in the queries' type.

        Rows are as the plan has them: `plan.queries[rank]`, scaled already, and
        `plan.keys[rank]`, cached and new. All ranks call this with the same plan. Raises
        RingError where tensors do not fit the plan, before anything is sent, and CommError.
        """
        ...


class PassKV:
    """Keys and values go round."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def attend(self, q_TNH: Tensor, kv_LXH: Tensor, plan: RingPlan) -> Tensor:
        rank = self._wire.rank
        _check(q_TNH, kv_LXH, plan, self._wire)
        partial = Partial.nothing(q_TNH)
        for origin, block_LXH in _round(self._wire, kv_LXH, plan.key_rows, plan.key_hops):
            _attend_block(partial, q_TNH, rank, block_LXH, origin, plan)
        return partial.out_TNH.to(q_TNH.dtype)


class PassQ:
    """Queries go round, and attention over a part of the keys comes home."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def attend(self, q_TNH: Tensor, kv_LXH: Tensor, plan: RingPlan) -> Tensor:
        wire = self._wire
        _check(q_TNH, kv_LXH, plan, wire)
        [tag] = wire.tags(1)
        others = [rank for rank in range(wire.size) if rank != wire.rank]
        coming = {r: Partial.undefined(q_TNH) for r in others if plan.sees(wire.rank, r)}
        pending = [wire.receive(part.memory, rank, tag) for rank, part in coming.items()]
        mine = Partial.nothing(q_TNH)
        for origin, block_TNH in _round(wire, q_TNH, plan.query_rows, plan.query_hops):
            if origin == wire.rank:
                _attend_block(mine, block_TNH, origin, kv_LXH, wire.rank, plan)
                continue
            if not plan.sees(origin, wire.rank):
                continue
            theirs = Partial.nothing(block_TNH)
            _attend_block(theirs, block_TNH, origin, kv_LXH, wire.rank, plan)
            pending.append(wire.send(theirs.memory, origin, tag))
        for each in pending:
            each.wait()
        for part in coming.values():
            mine.merge(part)
        return mine.out_TNH.to(q_TNH.dtype)


class GatherKV:
    """Every rank gets all keys and values before it begins: what the ring is compared with."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def attend(self, q_TNH: Tensor, kv_LXH: Tensor, plan: RingPlan) -> Tensor:
        wire = self._wire
        _check(q_TNH, kv_LXH, plan, wire)
        [tag] = wire.tags(1)
        blocks = [kv_LXH.new_empty(rows, *kv_LXH.shape[1:]) for rows in plan.key_rows]
        blocks[wire.rank] = kv_LXH.contiguous()
        others = [rank for rank in range(wire.size) if rank != wire.rank]
        pending = [wire.receive(blocks[r], r, tag) for r in others if plan.sees(wire.rank, r)]
        pending += [wire.send(blocks[wire.rank], r, tag) for r in others if plan.sees(r, wire.rank)]
        for each in pending:
            each.wait()
        partial = Partial.nothing(q_TNH)
        for origin, block_LXH in enumerate(blocks):
            if plan.sees(wire.rank, origin):
                _attend_block(partial, q_TNH, wire.rank, block_LXH, origin, plan)
        return partial.out_TNH.to(q_TNH.dtype)


def _round(
    wire: Wire, mine: Tensor, rows: Sequence[int], hops: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Yield the blocks that come by with their ranks, this one's first.

    While the caller has one, it is also being sent on, and the next one arrives beside it. A block
    is only good until the next one is asked for. That of rank i makes `hops[i]` hops.
    """
    size, rank = wire.size, wire.rank
    tags = wire.tags(size)
    following, previous = (rank + 1) % size, (rank - 1) % size
    current = mine.contiguous()
    buffers = current.new_empty(min(2, size - 1), max(rows), *mine.shape[1:])
    for step in range(size):
        origin, coming = (rank - step) % size, (rank - step - 1) % size
        pending = []
        arriving = buffers[step % 2][: rows[coming]] if step < hops[coming] else None
        if arriving is not None:
            pending.append(wire.receive(arriving, previous, tags[step]))
        if step < hops[origin]:
            pending.append(wire.send(current, following, tags[step]))
        if step <= hops[origin]:
            yield origin, current
        for each in pending:  # the next step receives into what this one sent
            each.wait()
        if arriving is not None:
            current = arriving


def _attend_block(
    into: Partial, q_TNH: Tensor, q_rank: int, kv_LXH: Tensor, kv_rank: int, plan: RingPlan
) -> None:
    """Add what one rank's queries see of one rank's keys, sequence by sequence."""
    for queries, keys in zip(plan.queries[q_rank], plan.keys[kv_rank], strict=True):
        low, high = block.seen(keys.at, queries.at, plan.window)
        if low < high:
            rows = slice(queries.begin, queries.end)
            kv = kv_LXH[keys.begin : keys.end]
            part = block.attend(q_TNH[rows], queries.at, kv, keys.at, plan.window)
            into.rows(queries.begin, queries.end).merge(part)


def _check(q_TNH: Tensor, kv_LXH: Tensor, plan: RingPlan, wire: Wire) -> None:
    if plan.ranks != wire.size:
        raise RingError(f"the plan is for {plan.ranks} ranks, and there are {wire.size}")
    wanted = plan.query_rows[wire.rank], plan.key_rows[wire.rank]
    if (len(q_TNH), len(kv_LXH)) != wanted:
        raise RingError(
            f"the plan gives rank {wire.rank} (queries, keys) {wanted}, "
            f"found {(len(q_TNH), len(kv_LXH))}"
        )
    heads, both = q_TNH.shape[1], kv_LXH.shape[1]
    kv_heads = 1 if both == 1 else both / 2
    if kv_heads < 1 or heads % kv_heads or kv_heads % 1 or q_TNH.shape[2] != kv_LXH.shape[2]:
        raise RingError(
            f"{heads} query heads of {q_TNH.shape[2]} elements cannot share {kv_heads:g} KV heads "
            f"of {kv_LXH.shape[2]}"
        )
    if q_TNH.dtype != kv_LXH.dtype or q_TNH.device != kv_LXH.device:
        raise RingError("queries and keys are of different types or on different devices")
