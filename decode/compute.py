"""Computes the steps that the worker decides on, on all ranks, and samples the tokens.

Owns what a rank knows of the sequences it decodes, and the way from a step to its tokens. Decides
nothing: which sequences step, and when they end, is the worker's.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from decode.ahead import Ahead, Coming
from decode.orders import NOTHING, Order
from decode.rank_experts import RankExperts
from decode.sequence import SequenceRecord
from engine.cache_memory import CacheMemory
from engine.runner import Chunk, Inputs, ModelRunner
from engine.sampling import Sampled, SequenceState, sample_apart
from engine.step_watch import REBALANCE, REST, SAMPLING
from engine.vocabulary import sample_part

_UNKNOWN = (0,)  # in place of a token that is to be chosen yet


class Row(NamedTuple):
    """A sequence's part in a step: its latest token, or a piece of its prompt of `length` tokens.

    `start` tokens before that are in the cache. `token_id` means nothing where there is a `length`.
    """

    request_id: int
    token_id: int
    start: int
    length: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens a pass has of it."""
        return self.length or 1


@dataclass(kw_only=True)
class DecodeSequence:
    """What a rank knows of one sequence. Blocks may be appended, here or where the list is from.

    `prompt` is given where the prompt is computed here.
    """

    blocks: list[int]
    sampling: SequenceState
    prompt: Sequence[int] = ()
    _table: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64), repr=False)

    def table(self) -> NDArray[np.int64]:
        """Return the blocks as passes take them; from any thread."""
        table = self._table
        if len(table) != len(self.blocks):
            table = self._table = np.array(self.blocks, np.int64)
        return table


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a dp rank makes of its rows: their next tokens, and how long choosing them took.

    Pieces of prompts that more of the prompt follows have none.
    """

    sampled: Sequence[Sampled] = ()
    sample_s: float = 0.0


Rows = Sequence[Sequence[Row]]  # of each dp rank
Done = Callable[[Sequence[Part]], None]  # of each dp rank; from any thread


class Compute(Protocol):
    """Runs steps on all ranks of an instance."""

    @property
    def depth(self) -> int:
        """How many steps may be under way at once: as many as there are stages."""
        ...

    def add(self, record: SequenceRecord) -> None:
        """A sequence will be decoded; from any thread."""
        ...

    def grow(self, record: SequenceRecord, block: int) -> None:
        """A sequence in no step has one more block; for the engine's thread."""
        ...

    def remove(self, request_id: int) -> None:
        """A sequence is over, and in no step under way; from any thread."""
        ...

    def run(self, rows: Rows, done: Done) -> None:
        """Compute a step; for the engine's thread. Returns when another one may begin."""
        ...


class RankCompute:
    """One rank's part in every step; `experts` are its own where ranks have different ones."""

    def __init__(
        self, runner: ModelRunner, memory: CacheMemory, experts: RankExperts | None = None
    ) -> None:
        layout = runner.layout
        self.dp_rank = layout.dp_rank
        self._samples = layout.pp_rank == layout.pp - 1
        # Whether it is the one that says which tokens its dp rank has chosen.
        self.answers = self._samples and layout.tp_rank == 0
        self._runner = runner
        self._memory = memory
        self._vocabulary = runner.vocabulary
        self._experts = experts
        self.watch = runner.watch
        self._sequences: dict[int, DecodeSequence] = {}
        self._ahead = Ahead(self._lay_out, depth=layout.pp)

    def add(self, request_id: int, sequence: DecodeSequence) -> None:
        """See Compute."""
        self._sequences[request_id] = sequence

    def grow(self, request_id: int, blocks: Sequence[int]) -> None:
        """A sequence has more blocks."""
        self._sequences[request_id].blocks.extend(blocks)

    def remove(self, request_id: int) -> None:
        """See Compute."""
        self._sequences.pop(request_id, None)

    def run(self, rows: Rows, order: Order = NOTHING) -> Part | None:
        """Compute this rank's part of a step; the tokens where it `answers` and there are any."""
        self.watch.begin()
        try:
            self._memory.before_pass()
            self._act(order)
            part = self._run(rows)
            if part is None or not part.sampled:
                # No token has waited for the pass; blocks may be freed when this has returned.
                self._memory.finish_passes()
            return part
        finally:
            self.watch.end()

    def _act(self, order: Order) -> None:
        if order != NOTHING:
            assert self._experts is not None
            self.watch.to(REBALANCE)
            self._experts.act(order)
            self.watch.to(REST)

    def _lay_out(self, step: Coming[DecodeSequence]) -> Inputs:
        chunks = [
            Chunk(token_ids=_UNKNOWN, start=start, block_table=sequence.table())
            for start, sequence in zip(step.starts, step.sequences, strict=True)
        ]
        return self._runner.prepare(chunks, step.dp_tokens)

    def _run(self, rows: Rows) -> Part | None:
        own = rows[self.dp_rank]
        sequences = [self._sequences[row.request_id] for row in own]
        for row, sequence in zip(own, sequences, strict=True):
            # Where the worker is another process, its rows are what tells which token was chosen.
            if not row.length and sequence.sampling.position == row.start:
                sequence.sampling.append(row.token_id)
        dp_tokens = [sum(row.tokens for row in of_rank) for of_rank in rows]
        if not own:
            self._runner.forward([], dp_tokens=dp_tokens)
            return None
        if any(row.length for row in own):
            chunks = [_chunk(row, of) for row, of in zip(own, sequences, strict=True)]
            logits_SW = self._runner.forward(chunks, dp_tokens=dp_tokens)
        else:
            logits_SW = self._step(own, sequences, dp_tokens)
        return self._sample(own, sequences, logits_SW) if self._samples else None

    def _step(
        self, own: Sequence[Row], sequences: Sequence[DecodeSequence], dp_tokens: Sequence[int]
    ) -> Tensor:
        starts = [row.start for row in own]
        step = Coming(sequences=sequences, starts=starts, dp_tokens=dp_tokens)
        return self._runner.step(
            self._ahead.inputs(step),
            [row.token_id for row in own],
            meanwhile=partial(self._ahead.follow, step),
        )

    def _sample(
        self, own: Sequence[Row], sequences: Sequence[DecodeSequence], logits_SW: Tensor
    ) -> Part | None:
        self.watch.to(SAMPLING)
        began_s = time.monotonic()
        choosing = [
            place
            for place, (row, sequence) in enumerate(zip(own, sequences, strict=True))
            if not row.length or row.start + row.length == len(sequence.prompt)
        ]
        if not choosing:
            return Part() if self.answers else None
        if len(choosing) < len(own):
            logits_SW = logits_SW[choosing]
        states = [sequences[place].sampling for place in choosing]
        choose = partial(sample_part, vocabulary=self._vocabulary)
        if self._runner.deterministic:
            sampled = sample_apart(choose, logits_SW, states)
        else:
            sampled = choose(logits_SW, states)
        part = Part(sampled=sampled, sample_s=time.monotonic() - began_s)
        return part if self.answers else None


def _chunk(row: Row, sequence: DecodeSequence) -> Chunk:
    if not row.length:
        return Chunk(token_ids=(row.token_id,), start=row.start, block_table=sequence.table())
    return Chunk(
        token_ids=sequence.prompt[row.start : row.start + row.length],
        start=row.start,
        block_table=sequence.table(),
        is_prompt=True,
    )


class Others(Protocol):
    """The other ranks of an instance."""

    def add(self, record: SequenceRecord) -> None:
        """See Compute."""
        ...

    def grow(self, request_id: int, block: int) -> None:
        """See Compute."""
        ...

    def remove(self, request_id: int) -> None:
        """See Compute."""
        ...

    def step(self, number: int, rows: Rows, order: Order) -> None:
        """Tell all of a step; what they make of it goes to `Steps.take`."""
        ...


@dataclass(kw_only=True)
class _UnderWay:
    done: Done
    parts: list[Part]
    missing: set[int]


class Steps:
    """All ranks' part in every step; see Compute.

    Args:
        own: This rank's, the instance's first one's.
        others: None where this is the only rank.
        order: Says what all ranks do before the step that begins.
    """

    def __init__(
        self,
        own: RankCompute,
        *,
        depth: int = 1,
        others: Others | None = None,
        order: Callable[[], Order] = lambda: NOTHING,
    ) -> None:
        self.depth = depth
        self._own = own
        self._others = others
        self._order = order
        self._number = 0
        self._lock = threading.Lock()
        self._under_way: dict[int, _UnderWay] = {}

    def add(self, record: SequenceRecord) -> None:
        """See Compute."""
        if record.dp_rank == 0:
            reservation = record.reservation
            sequence = DecodeSequence(
                blocks=record.blocks,
                sampling=record.sampling,
                prompt=reservation.known_ids if reservation.is_local else (),
            )
            self._own.add(record.request_id, sequence)
        if self._others is not None:
            self._others.add(record)

    def grow(self, record: SequenceRecord, block: int) -> None:
        """See Compute."""
        # This rank reads the record's own list, which has the block already.
        if self._others is not None:
            self._others.grow(record.request_id, block)

    def remove(self, request_id: int) -> None:
        """See Compute."""
        self._own.remove(request_id)
        if self._others is not None:
            self._others.remove(request_id)

    def run(self, rows: Rows, done: Done) -> None:
        """See Compute."""
        self._own.watch.begin()
        self._number += 1
        number, order = self._number, self._order()
        missing = {rank for rank, of_rank in enumerate(rows) if of_rank}  # the others say nothing
        parts = [Part() for _ in rows]
        with self._lock:
            self._under_way[number] = _UnderWay(done=done, parts=parts, missing=missing)
        if self._others is not None:
            self._others.step(number, rows, order)
        part = self._own.run(rows, order)
        if part is not None:
            self.take(number, self._own.dp_rank, part)

    def take(self, number: int, dp_rank: int, part: Part) -> None:
        """A dp rank has come to the end of a step; from any thread."""
        with self._lock:
            step = self._under_way[number]
            step.parts[dp_rank] = part
            step.missing.remove(dp_rank)
            if step.missing:
                return
            del self._under_way[number]
        step.done(step.parts)
