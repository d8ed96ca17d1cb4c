"""A decode or colocated instance on the virtual clock: decode's own scheduler, times from `Costs`.

Owns the running batch and how far each sequence has come. A step's batch stays as it is until a
sequence comes or ends, so all steps until then are taken at once: a step grows longer evenly with
the tokens that it adds to the cache, and so their sum is known. Steps with pieces of prompts are
taken one by one.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from decode.scheduler import Scheduler
from decode.scheduler import Step as Batch
from planner.costs import Chunk
from planner.simulator.clock import Clock
from planner.simulator.setup import Decodes
from service.step_fit import StepFit, StepSpeed


@dataclass(slots=True, kw_only=True)
class _Sequence:
    """`computed` of the prompt are here; it steps from `since` on, None: it does not step yet."""

    prompt_tokens: int
    output_tokens: int
    computed: int
    since: int | None = None


@dataclass(slots=True, kw_only=True)
class _Run:
    """Steps of one batch: the first takes `first_s`, each other one `growth_s` more."""

    batch: Batch
    pieces: dict[int, int]
    sequences: int
    tokens: int
    began: float
    steps: int
    first_s: float
    growth_s: float

    def seconds(self, steps: int) -> float:
        """Return how long the first ones take together."""
        return steps * (self.first_s + self.growth_s * (steps - 1) / 2)

    def begun(self, elapsed_s: float) -> int:
        """Return how many steps there are until the one of this moment is over; one at least."""
        # The root of steps^2 * growth / 2 + steps * linear = elapsed.
        linear = self.first_s - self.growth_s / 2
        if self.growth_s * self.steps < 1e-9 * self.first_s:
            exact = elapsed_s / self.first_s
        else:
            root = math.sqrt(linear * linear + 2 * self.growth_s * elapsed_s)
            exact = (root - linear) / self.growth_s
        return min(self.steps, max(1, math.ceil(exact - 1e-9)))


class DecodeInstance:
    """Steps through all sequences that the scheduler has in its batch.

    Args:
        on_first: Called with a request whose prompt was computed here.
        on_end: Called with a request whose answer is complete.
        fit: Told of steps without prompts, where anybody wants to know how fast the instance is.
    """

    def __init__(
        self,
        clock: Clock,
        pool: Decodes,
        *,
        on_first: Callable[[int], None],
        on_end: Callable[[int], None],
        fit: StepFit | None = None,
    ) -> None:
        self._steps = 0
        self._fit = fit
        self._slowdown = 1.0
        self._clock = clock
        self._costs = pool.costs
        self._dp = pool.dp
        self._on_first, self._on_end = on_first, on_end
        self._scheduler = Scheduler(
            max_batch=pool.max_batch, dp=pool.dp, step_tokens=pool.chunk_tokens
        )
        self._sequences: dict[int, _Sequence] = {}
        # Those whose prompt is computed here, and those that have it and do not step yet.
        self._prompts: dict[int, None] = {}
        self._joining: dict[int, None] = {}
        self._ends: list[tuple[int, int]] = []  # after which step a request is over
        self._tokens = 0  # cached for those that step
        self._run: _Run | None = None

    def add(
        self,
        request_id: int,
        *,
        prompt_tokens: int,
        output_tokens: int,
        dp_rank: int = 0,
        missing_tokens: int = 0,
    ) -> None:
        """Take a sequence in; all but `missing_tokens` of its prompt is here."""
        self._sequences[request_id] = _Sequence(
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            computed=prompt_tokens - missing_tokens,
        )
        (self._prompts if missing_tokens else self._joining)[request_id] = None
        self._scheduler.add(request_id, dp_rank, missing_tokens)
        if self._run is None:
            self._begin()
        else:
            self._cut(self._run)

    def slow_down(self, times: float) -> None:
        """Let steps take so many times as long, from the next one on."""
        self._slowdown = times
        if self._run is not None:
            self._cut(self._run)

    @property
    def is_busy(self) -> bool:
        """Whether there is a step under way."""
        return self._run is not None

    @property
    def speed(self) -> StepSpeed | None:
        """How fast it is, as far as anybody wants to know."""
        return self._fit.speed if self._fit is not None else None

    def tokens_of(self, request_id: int) -> int:
        """Return how many tokens of its answer a sequence has by now, the first one counted."""
        sequence = self._sequences[request_id]
        if sequence.since is None:
            return int(sequence.computed == sequence.prompt_tokens)
        return 1 + self._steps + self._whole_steps() - sequence.since

    def _whole_steps(self) -> int:
        run = self._run
        if run is None:
            return 0
        elapsed_s = self._clock.now - run.began
        begun = run.begun(elapsed_s)
        return begun if run.seconds(begun) <= elapsed_s else begun - 1

    def stop(self) -> None:
        """Compute nothing more."""
        self._run = None

    def _begin(self) -> None:
        batch = self._scheduler.schedule()
        if not batch:
            return
        pieces = {r: tokens for r in self._prompts if (tokens := self._scheduler.piece(r))}
        if self._joining:
            self._join(batch)
        sequences = sum(map(len, batch)) - len(pieces)
        rows = sequences
        if self._dp > 1:  # the fullest of them is waited for
            rows = self._dp * max(len(of) - sum(r in pieces for r in of) for of in batch)
        run = self._run = _Run(
            batch=batch,
            pieces=pieces,
            sequences=sequences,
            tokens=self._tokens,
            began=self._clock.now,
            steps=1 if pieces else self._ends[0][0] - self._steps,
            first_s=self._step_s(pieces, rows, self._tokens),
            growth_s=0.0,
        )
        if run.steps > 1:
            last_s = self._step_s({}, rows, self._tokens + (run.steps - 1) * sequences)
            run.growth_s = max(0.0, last_s - run.first_s) / (run.steps - 1)
        self._clock.after(run.seconds(run.steps), partial(self._finish, run, run.steps))

    def _join(self, batch: Batch) -> None:
        stepping = set().union(*batch)
        for request_id in [r for r in self._joining if r in stepping]:
            del self._joining[request_id]
            sequence = self._sequences[request_id]
            sequence.since = self._steps
            self._tokens += sequence.prompt_tokens
            # The first token was there before.
            heapq.heappush(self._ends, (self._steps + sequence.output_tokens - 1, request_id))

    def _step_s(self, pieces: dict[int, int], rows: int, tokens: int) -> float:
        if not pieces:
            return self._slowdown * self._costs.decode_step_s(rows, tokens)
        chunks = [Chunk(piece, self._sequences[r].computed) for r, piece in pieces.items()]
        return self._slowdown * self._costs.mixed_step_s(chunks, rows, tokens)

    def _cut(self, run: _Run) -> None:
        """Let the batch change after the step that is under way."""
        steps = run.begun(self._clock.now - run.began)
        if steps < run.steps:
            run.steps = steps
            self._clock.at(run.began + run.seconds(steps), partial(self._finish, run, steps))

    def _finish(self, run: _Run, steps: int) -> None:
        if self._run is not run or run.steps != steps:
            return  # it was cut, or the instance is no more
        self._run = None
        self._steps += steps
        self._tokens += steps * run.sequences
        if self._fit is not None and not run.pieces:
            mean_tokens = run.tokens + (steps - 1) * run.sequences // 2
            self._fit.observe(run.sequences, mean_tokens, run.seconds(steps) / steps)
        self._scheduler.finished(run.batch)
        for request_id, tokens in run.pieces.items():
            self._computed(request_id, tokens)
        while self._ends and self._ends[0][0] <= self._steps:
            _, request_id = heapq.heappop(self._ends)
            sequence = self._sequences[request_id]
            self._tokens -= sequence.prompt_tokens + sequence.output_tokens - 1
            self._end(request_id)
        self._begin()

    def _computed(self, request_id: int, tokens: int) -> None:
        sequence = self._sequences[request_id]
        sequence.computed += tokens
        if sequence.computed < sequence.prompt_tokens:
            return
        del self._prompts[request_id]
        self._on_first(request_id)
        if sequence.output_tokens == 1:
            self._end(request_id)
        else:
            self._joining[request_id] = None

    def _end(self, request_id: int) -> None:
        del self._sequences[request_id]
        self._scheduler.remove(request_id)
        self._on_end(request_id)
