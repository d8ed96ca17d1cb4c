"""Computes the steps that the worker decides on, on all ranks, and samples the tokens.

Owns what a rank knows of the sequences it decodes, and the way from a step to its tokens. Decides
nothing: which sequences step, and when they end, is the worker's.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from decode.admission import SequenceRecord
from engine.pipeline import Logits
from engine.runner import Chunk, ModelRunner
from engine.sampling import Sampled, SequenceState, sample

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A sequence's part in a step: its latest token, of which `start` others are in the cache."""

    request_id: int
    token_id: int
    start: int


@dataclass(frozen=True, kw_only=True)
class DecodeSequence:
    """What a rank knows of one sequence."""

    blocks: Sequence[int]
    sampling: SequenceState


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a dp rank's first rank makes of its rows: their next tokens, and how long it took."""

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

    def remove(self, request_id: int) -> None:
        """A sequence is over, and in no step under way; from any thread."""
        ...

    def run(self, rows: Rows, done: Done) -> None:
        """Compute a step; for the engine's thread. Returns when another one may begin."""
        ...


class RankCompute:
    """One rank's part in every step.

    Args:
        dp_rank: Whose rows it computes.
        samples: Whether it gets the logits, as each dp rank's first rank does.
    """

    def __init__(self, runner: ModelRunner, *, dp_rank: int = 0, samples: bool = True) -> None:
        self._runner = runner
        self._dp_rank = dp_rank
        self._samples = samples
        self._sequences: dict[int, DecodeSequence] = {}

    def add(self, request_id: int, sequence: DecodeSequence) -> None:
        """See Compute."""
        self._sequences[request_id] = sequence

    def remove(self, request_id: int) -> None:
        """See Compute."""
        self._sequences.pop(request_id, None)

    def begin(self, rows: Rows) -> Callable[[], Part]:
        """Compute this rank's stage of a step; the result waits for the others, and samples."""
        own = rows[self._dp_rank]
        sequences = [self._sequences[row.request_id] for row in own]
        for row, sequence in zip(own, sequences, strict=True):
            # Where the worker is another process, its rows are what tells which token was chosen.
            if sequence.sampling.position == row.start:
                sequence.sampling.append(row.token_id)
        logits = self._runner.start(
            [
                Chunk(token_ids=[row.token_id], start=row.start, block_table=sequence.blocks)
                for row, sequence in zip(own, sequences, strict=True)
            ]
        )
        states = [sequence.sampling for sequence in sequences] if self._samples else []
        return lambda: _sampled(logits, states)


def _sampled(logits: Logits, states: Sequence[SequenceState]) -> Part:
    logits_SV = logits.wait()
    if not states:
        return Part()
    began_s = time.monotonic()
    sampled = sample(logits_SV, states)
    return Part(sampled=sampled, sample_s=time.monotonic() - began_s)


class InOrder:
    """What is left of the steps of a rank once its own stage is done with them.

    With one stage that is done at once; with several on a thread, while later steps begin.

    Args:
        on_fatal: Called where a step is lost.
    """

    def __init__(self, depth: int, on_fatal: Callable[[BaseException], None]) -> None:
        self._on_fatal = on_fatal
        self._queue: queue.SimpleQueue[Callable[[], None] | None] | None = None
        if depth > 1:
            self._queue = queue.SimpleQueue()
            threading.Thread(target=self._main, name="decode-logits", daemon=True).start()

    def put(self, rest: Callable[[], None]) -> None:
        """Have the rest of a step done after that of the steps before."""
        if self._queue is None:
            rest()
        else:
            self._queue.put(rest)

    def close(self) -> None:
        """Let go of the steps that are under way."""
        if self._queue is not None:
            self._queue.put(None)

    def _main(self) -> None:
        assert self._queue is not None
        try:
            while (rest := self._queue.get()) is not None:
                rest()
        except BaseException as error:
            log.exception("a step is lost")
            self._on_fatal(error)


class Others(Protocol):
    """The other ranks of an instance."""

    def add(self, record: SequenceRecord) -> None:
        """See Compute."""
        ...

    def remove(self, request_id: int) -> None:
        """See Compute."""
        ...

    def step(self, number: int, rows: Rows) -> None:
        """Tell all of a step; what dp ranks but the first make of it goes to `Steps.take`."""
        ...


@dataclass(kw_only=True)
class _UnderWay:
    done: Done
    parts: list[Part]
    missing: set[int] = field(default_factory=set)


class Steps:
    """All ranks' part in every step; see Compute.

    Args:
        own: This rank's, the instance's first one's.
        others: None where this is the only rank.
        on_fatal: Called where a step is lost.
    """

    def __init__(
        self,
        own: RankCompute,
        *,
        depth: int = 1,
        others: Others | None = None,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.depth = depth
        self._own = own
        self._others = others
        self._rest = InOrder(depth, on_fatal)
        self._number = 0
        self._lock = threading.Lock()
        self._under_way: dict[int, _UnderWay] = {}

    def add(self, record: SequenceRecord) -> None:
        """See Compute."""
        if record.dp_rank == 0:
            sequence = DecodeSequence(blocks=record.blocks, sampling=record.sampling)
            self._own.add(record.request_id, sequence)
        if self._others is not None:
            self._others.add(record)

    def remove(self, request_id: int) -> None:
        """See Compute."""
        self._own.remove(request_id)
        if self._others is not None:
            self._others.remove(request_id)

    def run(self, rows: Rows, done: Done) -> None:
        """See Compute."""
        self._number += 1
        number = self._number
        # A dp rank without rows has nothing to say; the first one always ends the step here.
        missing = {0, *(rank for rank, of_rank in enumerate(rows) if of_rank)}
        parts = [Part() for _ in rows]
        with self._lock:
            self._under_way[number] = _UnderWay(done=done, parts=parts, missing=missing)
        if self._others is not None:
            self._others.step(number, rows)
        finish = self._own.begin(rows)
        self._rest.put(lambda: self.take(number, 0, finish()))

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

    def close(self) -> None:
        """Let go of the steps that are under way."""
        self._rest.close()
