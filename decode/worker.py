"""The decode engine's thread: one step of the whole batch after another.

Owns the running batch. What a sequence holds is `Admission`'s. Knows nothing of gRPC, nor of how
many ranks compute: sequences are announced through `ready` and `abort` from any thread, and each
step's tokens go out through one callback, grouped by router.
"""

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from decode.admission import Admission
from decode.compute import Compute, Part, Row, Rows
from decode.scheduler import Scheduler
from decode.scheduler import Step as Batch
from decode.sequence import SequenceRecord, State
from engine.sampling import Sampled
from service.hung_steps import await_last_step

log = logging.getLogger(__name__)


class First(NamedTuple):
    """How a prompt that was computed here came to its first token."""

    cached_tokens: int
    queue_s: float
    prefill_s: float


class Token(NamedTuple):
    """One sequence's part of a step; `first` where it is the first one after a prompt."""

    request_id: int
    sampled: Sampled
    finish: str | None
    first: First | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: its tokens by router id, and how long it took, all in all and for parts.

    Attributes:
        forward_s: The model on all ranks.
        sample_s: Choosing the tokens, on the dp rank where it took longest.
        gap_s: From the end of the step before, where there was no lack of sequences, to this one's
            beginning: 0 where steps overlap.
        grown_blocks: Blocks taken since the step before for sequences that had outgrown theirs.
        wait_s: In which the loop stood still for other ranks, since the step before.
        prompt_tokens: Of prompts that it has computed.
    """

    tokens: Mapping[str, list[Token]]
    seconds: float
    forward_s: float
    sample_s: float
    gap_s: float
    wait_s: float
    grown_blocks: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class _Abort:
    request_id: int


@dataclass(frozen=True, kw_only=True)
class _Pause:
    request_id: int


@dataclass(frozen=True, kw_only=True)
class _Resume:
    request_id: int


@dataclass(frozen=True, kw_only=True)
class _Room:
    pass


@dataclass(frozen=True, kw_only=True)
class _Computed:
    batch: Batch
    rows: Rows
    began_s: float
    gap_s: float
    ended_s: float
    parts: Sequence[Part]


_Item = int | _Abort | _Pause | _Resume | _Room | _Computed


class Worker:
    """Steps the batch until it is stopped; sleeps while there is none.

    Args:
        emit: Called with each step's tokens from the worker's thread; must return at once.
        on_paused: Called with each sequence that has left the batch as asked, after its tokens.
        hand_back: Called likewise with each sequence that has to end for want of blocks, or was to
            pause before its prompt was computed. A running one has no more steps; one that is
            reserved yet is the callee's to end.
        on_fatal: Called once when the engine itself breaks; the instance must then go down.
    """

    def __init__(
        self,
        *,
        compute: Compute,
        admission: Admission,
        scheduler: Scheduler,
        emit: Callable[[Step], None],
        hand_back: Callable[[SequenceRecord], None] = lambda _: None,
        on_fatal: Callable[[BaseException], None],
        on_paused: Callable[[SequenceRecord], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._compute = compute
        self._admission = admission
        self._scheduler = scheduler
        self._emit = emit
        self._hand_back = hand_back
        self._on_fatal = on_fatal
        self._on_paused = on_paused
        self._clock = clock
        self._inbox: deque[_Item] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._under_way = 0
        self._ended_steps = 0
        self._grown_blocks = 0
        self._stepping: set[int] = set()
        # Sequences that were aborted during a step of theirs: they end with it.
        self._leaving: set[int] = set()
        # Likewise those that are to pause with it.
        self._pausing: set[int] = set()
        self._idle_since_s: float | None = None
        self._waited_s = 0.0
        self._thread = threading.Thread(target=self._main, name="decode-engine", daemon=True)

    # ---- any thread

    def start(self) -> None:
        """Start stepping."""
        self._thread.start()

    def ready(self, request_id: int) -> None:
        """A sequence may join the batch."""
        self._post(request_id)

    def abort(self, request_id: int) -> None:
        """End a running sequence before its next step; no more of its tokens are emitted then."""
        self._post(_Abort(request_id=request_id))

    def pause(self, request_id: int) -> None:
        """Take a running sequence out of the batch before its next step; `on_paused` follows.

        It does not where the sequence has ended by then.
        """
        self._post(_Pause(request_id=request_id))

    def resume(self, request_id: int) -> None:
        """Put a paused sequence back, if it is still here."""
        self._post(_Resume(request_id=request_id))

    def room(self) -> None:
        """There may be a block for a sequence that lacks one."""
        self._post(_Room())

    def stop(self) -> None:
        """Stop after the step in progress and wait for the thread to end; if that hangs, break."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await_last_step(self._thread, self._on_fatal)

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Sequences that are ready but find no room in the batch."""
        return self._scheduler.waiting

    @property
    def step_under_way(self) -> int | None:
        """The number of the oldest step that has not ended, None where there is none."""
        return self._ended_steps if self._under_way else None

    def _post(self, item: _Item) -> None:
        with self._wake:
            self._inbox.append(item)
            self._wake.notify()

    # ---- the worker's thread

    def _main(self) -> None:
        try:
            while not self._stopping:
                if not self.turn():
                    self._wait()
        except BaseException as error:
            log.exception("the decode engine broke")
            self._on_fatal(error)

    def turn(self) -> bool:
        """Act on what has come, and begin a step if there may be one; whether there was."""
        self._take_inbox()
        return self._begin()

    def _wait(self) -> None:
        began_s = self._clock()
        with self._wake:
            while not self._inbox and not self._stopping:
                self._wake.wait()
        if self._under_way:
            self._waited_s += self._clock() - began_s

    def _take_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, _Computed):
                self._finish(item)
            elif isinstance(item, _Abort):
                self._end(item.request_id)
            elif isinstance(item, _Pause):
                self._pause(item.request_id)
            elif isinstance(item, _Resume):
                self._resume(item.request_id)
            elif isinstance(item, _Room):
                continue  # the next step is tried anyway
            elif self._admission.holds(item):  # else an abort overtook the announcement
                record = self._admission.running(item)
                self._scheduler.add(item, record.dp_rank, record.missing_tokens)

    def _begin(self) -> bool:
        """Begin a step, if there may be another one and there is a sequence for it."""
        if self._under_way == self._compute.depth:
            return False
        lacking = self._grow() if self._admission.overcommits else ()
        batch = self._scheduler.schedule(lacking, self._enter)
        if not batch:
            return False
        began_s = self._clock()
        gap_s = began_s - self._idle_since_s if self._idle_since_s is not None else 0.0
        rows = [[self._row(r, began_s) for r in of_rank] for of_rank in batch]
        self._stepping.update(*batch)
        self._under_way += 1
        self._idle_since_s = None
        self._compute.run(
            rows,
            lambda parts: self._post(
                _Computed(
                    batch=batch,
                    rows=rows,
                    began_s=began_s,
                    gap_s=gap_s,
                    ended_s=self._clock(),
                    parts=parts,
                )
            ),
        )
        return True

    def _enter(self, request_id: int) -> int:
        """Share what others have computed of a prompt since it came; return what it misses then."""
        record = self._admission.running(request_id)
        if self._admission.look_again(request_id):
            self._compute.remove(request_id)
            self._compute.add(record)
        return record.missing_tokens

    def _row(self, request_id: int, now: float) -> Row:
        record = self._admission.running(request_id)
        if piece := self._scheduler.piece(request_id):
            record.began_s = now if record.began_s is None else record.began_s
            return Row(request_id, 0, record.computed_tokens, piece)
        assert record.last_token_id is not None  # or it would not be running
        # All but the last token are in the cache.
        return Row(request_id, record.last_token_id, record.sampling.position - 1)

    def _grow(self) -> Collection[int]:
        """Make room for the next tokens; the sequences that have none yet.

        A sequence that waits for what is coming back is tried again with each step, and when
        `room` tells of it.
        """
        while True:
            growth = self._admission.grow(self._scheduler.idle)
            for record, block in growth.grown:
                self._compute.grow(record, block)
            self._grown_blocks += len(growth.grown)
            if not growth.handed_back:
                return growth.lacking
            for record in growth.handed_back:
                if record.state is State.RUNNING:
                    self._end(record.request_id)
                self._hand_back(record)

    def _finish(self, step: _Computed) -> None:
        self._under_way -= 1
        self._ended_steps += 1
        self._scheduler.finished(step.batch)
        tokens: dict[str, list[Token]] = defaultdict(list)
        for rows, part in zip(step.rows, step.parts, strict=True):
            self._stepping.difference_update(row.request_id for row in rows)
            for row, sampled in self._outcomes(rows, part):
                if row.request_id in self._leaving:
                    self._leaving.remove(row.request_id)
                    self._pausing.discard(row.request_id)
                    self._end(row.request_id)
                elif sampled is not None:
                    router_id, token = self._next_token(row, sampled, step.ended_s)
                    tokens[router_id].append(token)
        now = self._clock()
        waited_s, self._waited_s = self._waited_s, 0.0
        sample_s = max(part.sample_s for part in step.parts)
        if not self._under_way and self._scheduler.running:
            self._idle_since_s = step.ended_s
        self._emit(
            Step(
                tokens=tokens,
                seconds=now - step.began_s,
                forward_s=step.ended_s - step.began_s - sample_s,
                sample_s=sample_s,
                gap_s=step.gap_s,
                grown_blocks=self._grown_blocks,
                wait_s=waited_s,
                prompt_tokens=sum(row.length for rows in step.rows for row in rows),
            )
        )
        for request_id in [r for of_rank in step.batch for r in of_rank if r in self._pausing]:
            self._pausing.remove(request_id)
            self._pause(request_id)
        self._grown_blocks = 0

    def _outcomes(self, rows: Sequence[Row], part: Part) -> Iterator[tuple[Row, Sampled | None]]:
        """What has come of each row; of a piece of a prompt there may be nothing to tell yet."""
        sampled = iter(part.sampled)
        for row in rows:
            if row.length and self._admission.computed(row.request_id, row.length).missing_tokens:
                yield row, None
            else:
                yield row, next(sampled)
        assert next(sampled, None) is None

    def _next_token(self, row: Row, sampled: Sampled, ended_s: float) -> tuple[str, Token]:
        request_id = row.request_id
        record = self._admission.running(request_id)
        reservation = record.reservation
        first = _first(record, ended_s) if row.length else None
        record.append(sampled.token_id)
        finish = reservation.stop.check(sampled.token_id, record.sampling.output_len)
        if finish is not None:
            # Before the router hears of it: it may give these blocks to another at once.
            self._end(request_id)
        return reservation.router_id, Token(request_id, sampled, finish, first)

    def _pause(self, request_id: int) -> None:
        if request_id in self._stepping:
            self._pausing.add(request_id)
        elif (record := self._admission.pause(request_id)) is not None:  # else it has ended
            self._scheduler.remove(request_id)
            if record.missing_tokens:
                # There is nothing yet that another instance could go on from.
                self._end(request_id)
                self._hand_back(record)
            else:
                self._on_paused(record)

    def _resume(self, request_id: int) -> None:
        self._pausing.discard(request_id)
        if (record := self._admission.resume(request_id)) is not None:
            self._scheduler.add(request_id, record.dp_rank)

    def _end(self, request_id: int) -> None:
        if request_id in self._stepping:
            self._leaving.add(request_id)
            return
        self._scheduler.remove(request_id)
        self._admission.end(request_id)


def _first(record: SequenceRecord, ended_s: float) -> First:
    assert record.began_s is not None
    return First(
        cached_tokens=record.cached_tokens,
        queue_s=record.began_s - record.came_s,
        prefill_s=ended_s - record.began_s,
    )
