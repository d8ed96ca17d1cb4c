"""The decode engine's thread: one step of the whole batch after another.

Owns the model runner and the running batch. What a sequence holds is `Admission`'s. Knows nothing
of gRPC: sequences are announced through `ready` and `abort` from any thread, and each step's tokens
go out through one callback, grouped by router.
"""

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from decode.admission import Admission, SequenceRecord
from decode.scheduler import Scheduler
from engine.runner import Chunk, ModelRunner
from engine.sampling import Sampled, sample

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Token:
    """One sequence's part of a step."""

    request_id: int
    sampled: Sampled
    finish: str | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the batch: its tokens by router id, and how long it took."""

    tokens: Mapping[str, list[Token]]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Abort:
    request_id: int


class Worker:
    """Steps the batch until it is stopped; sleeps while there is none.

    Args:
        emit: Called with each step's tokens from the worker's thread; must return at once.
        on_fatal: Called once when the engine itself breaks; the instance must then go down.
    """

    def __init__(
        self,
        *,
        runner: ModelRunner,
        admission: Admission,
        scheduler: Scheduler,
        emit: Callable[[Step], None],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._runner = runner
        self._admission = admission
        self._scheduler = scheduler
        self._emit = emit
        self._on_fatal = on_fatal
        self._inbox: deque[int | _Abort] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="decode-engine", daemon=True)

    # ---- any thread

    def start(self) -> None:
        """Start stepping."""
        self._thread.start()

    def ready(self, request_id: int) -> None:
        """A sequence may join the batch."""
        self._post(request_id)

    def abort(self, request_id: int) -> None:
        """End a running sequence before the next step; no more of its tokens are emitted then."""
        self._post(_Abort(request_id=request_id))

    def stop(self) -> None:
        """Stop after the step in progress and wait for the thread to end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Sequences that are ready but find no room in the batch."""
        return self._scheduler.waiting

    def _post(self, item: int | _Abort) -> None:
        with self._wake:
            self._inbox.append(item)
            self._wake.notify()

    # ---- the worker's thread

    def _main(self) -> None:
        try:
            while not self._stopping:
                self._take_inbox()
                batch = self._scheduler.schedule()
                if batch:
                    self._step(batch)
                else:
                    self._wait()
        except BaseException as error:
            log.exception("the decode engine broke")
            self._on_fatal(error)

    def _wait(self) -> None:
        with self._wake:
            while not self._inbox and not self._stopping:
                self._wake.wait()

    def _take_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, _Abort):
                self._end(item.request_id)
            elif self._admission.holds(item):  # else an abort overtook the announcement
                self._scheduler.add(item)

    def _step(self, batch: tuple[int, ...]) -> None:
        began_s = time.monotonic()
        records = [self._admission.running(request_id) for request_id in batch]
        logits_SV = self._runner.forward([_next_chunk(record) for record in records])
        sampled = sample(logits_SV, [record.sampling for record in records])
        tokens: dict[str, list[Token]] = defaultdict(list)
        for record, choice in zip(records, sampled, strict=True):
            record.append(choice.token_id)
            reservation = record.reservation
            finish = reservation.stop.check(choice.token_id, record.sampling.output_len)
            token = Token(request_id=record.request_id, sampled=choice, finish=finish)
            tokens[reservation.router_id].append(token)
            if finish is not None:
                # Before the router hears of it: it may give these blocks to another at once.
                self._end(record.request_id)
        self._emit(Step(tokens=tokens, seconds=time.monotonic() - began_s))

    def _end(self, request_id: int) -> None:
        self._scheduler.remove(request_id)
        self._admission.end(request_id)


def _next_chunk(record: SequenceRecord) -> Chunk:
    assert record.last_token_id is not None  # or it would not be running
    # All but the last token are in the cache.
    written = record.sampling.position - 1
    return Chunk(token_ids=[record.last_token_id], start=written, block_table=record.blocks)
