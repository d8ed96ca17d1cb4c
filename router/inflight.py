"""Owns the life of a request in the router: its place, its tries, its answer, its deadline.

One coroutine for each request; cancelling it is the abort. It never waits for the client: what a
slow one has not taken yet is bounded by max_new_tokens, and a deadline ends the work all the same.
"""

import asyncio
import dataclasses
import logging
import random
from collections.abc import Callable

from router.admission import Admission
from router.answer import Answer
from router.attempt import Attempt
from router.ledger import InstanceKey
from router.membership import Model
from router.metrics import Metrics
from router.pools import Pools, model_changed
from router.queue import Waiting
from router.request import AnswerPart, Stats, ValidRequest
from router.tasks import Tasks
from service.errors import (
    DeadlineExceeded,
    ServiceError,
    Unavailable,
    WorkFailed,
)
from text import Tokenizer

Emit = Callable[[AnswerPart], None]

# The low bits of a request's id count its tries, so that each try's id is its own.
_TRY_BITS = 4
_RETRY_BACKOFF_S = 0.05
# An instance's clock for the same deadline runs out at about the same moment.
_DEADLINE_MARGIN_S = 0.05


_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One request to be answered. `deadline` is a reading of the router's clock, in seconds."""

    request_id: int
    request: ValidRequest
    model: Model
    tokenizer: Tokenizer
    deadline: float

    @property
    def shown_id(self) -> str:
        """The id as clients and logs see it."""
        return f"{self.request_id:016x}"


class Inflight:
    """All requests between admission and their end."""

    def __init__(
        self,
        *,
        pools: Pools,
        admission: Admission,
        metrics: Metrics,
        max_queue_wait_s: float,
        max_retries: int,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        if max_retries >= 1 << _TRY_BITS:
            raise ValueError(f"max_retries must be below {1 << _TRY_BITS}, found {max_retries}")
        self._pools = pools
        self._admission = admission
        self._metrics = metrics
        self._max_queue_wait_s = max_queue_wait_s
        self._max_retries = max_retries
        self._clock = clock
        self._rng = rng
        self._tasks = Tasks()

    def new_request_id(self) -> int:
        return self._rng.getrandbits(64 - _TRY_BITS) << _TRY_BITS

    async def serve(self, job: Job, stats: Stats, emit: Emit) -> None:
        """Answers a request through `emit`, noting its way in `stats`; returns after the last part.

        Raises ServiceError.
        """
        try:
            async with asyncio.timeout(job.deadline - self._clock()):
                await self._serve(job, stats, emit)
        except TimeoutError as exc:
            raise DeadlineExceeded from exc

    async def settle(self) -> None:
        """Returns once all that ended requests held is given back."""
        await self._tasks.wait()

    async def _serve(self, job: Job, stats: Stats, emit: Emit) -> None:
        run = _Run(job, self._with_seed(job.request), stats, self._max_retries)
        while True:
            attempt = await self._begin(run)
            try:
                attempt.start()
                await self._relay(attempt, run, emit)
                return
            except ServiceError as exc:
                if attempt.suspect is not None and exc.retryable:
                    self._pools.suspect(attempt.suspect)
                    run.avoid |= {attempt.suspect}
                self._judge(exc, run)
                _log.info("starting over: %s", exc.message, extra={"request_id": job.shown_id})
            finally:
                attempt.close()
            if run.next_id() is None:
                raise AssertionError("a request is started over more often than it may be")
            self._metrics.retried()
            await asyncio.sleep(_RETRY_BACKOFF_S * run.stats.retries)

    def _check_model(self, model: Model) -> None:
        """A prompt's tokens are those of the model that was served when it came."""
        now = self._pools.members.model
        if now is None or now.fingerprint != model.fingerprint:
            raise model_changed()

    async def _begin(self, run: "_Run") -> Attempt:
        """Waits for room and makes the try that uses it."""
        self._check_model(run.job.model)
        attempt_id = run.id
        deadline = run.job.deadline
        asked_at = self._clock()
        waiting = Waiting(
            request_id=attempt_id,
            need=run.request.need,
            priority=run.request.priority,
            start_by=min(deadline, asked_at + self._max_queue_wait_s),
            cached_tokens=self._pools.prefixes.lookup(run.request),
            avoid=run.avoid,
        )
        try:
            placement = await self._admission.admit(waiting)
        except BaseException as exc:
            # It may have been cancelled in the very moment that room was found.
            self._admission.release(attempt_id)
            if isinstance(exc, ServiceError) and self._is_over(deadline):
                raise DeadlineExceeded from exc
            raise
        waited_s = self._clock() - asked_at
        run.stats.queue_s += waited_s
        self._metrics.waited(waited_s)
        self._metrics.placed(placement.cached_tokens)
        return Attempt(
            attempt_id,
            run.request,
            placement,
            pools=self._pools,
            admission=self._admission,
            metrics=self._metrics,
            tasks=self._tasks,
            stats=run.stats,
            deadline=deadline,
            clock=self._clock,
            next_id=run.next_id,
        )

    async def _relay(self, attempt: Attempt, run: "_Run", emit: Emit) -> None:
        while True:
            part = run.answer.push(await attempt.next_tokens())
            emit(part)
            if part.finish is not None:
                return

    def _judge(self, error: ServiceError, run: "_Run") -> None:
        """Returns where the request may be started over, else raises what the client gets."""
        if self._is_over(run.job.deadline):
            raise DeadlineExceeded from error
        if not error.retryable:
            raise error
        has_begun = run.answer.completion_tokens > 0
        if has_begun or not run.may_go_on:
            raise _for_client(error) from error

    def _is_over(self, deadline: float) -> bool:
        return self._clock() >= deadline - _DEADLINE_MARGIN_S

    def _with_seed(self, request: ValidRequest) -> ValidRequest:
        """Draws a seed where chance plays a part, so that a second try says the same."""
        sampling = request.sampling
        if sampling.seed is not None or sampling.temperature == 0.0:
            return request
        seeded = dataclasses.replace(sampling, seed=self._rng.getrandbits(63))
        return dataclasses.replace(request, sampling=seeded)


class _Run:
    """One request over all its tries."""

    def __init__(self, job: Job, request: ValidRequest, stats: Stats, max_retries: int) -> None:
        self.job = job
        self.request = request
        self.answer = Answer(job.tokenizer, request.prompt_token_ids, request.stop)
        self.stats = stats
        self.avoid: frozenset[InstanceKey] = frozenset()
        self._max_retries = max_retries

    @property
    def id(self) -> int:
        """The request's id in the pools: each try has its own, and each instance in a try."""
        return self.job.request_id | self.stats.retries

    @property
    def may_go_on(self) -> bool:
        return self.stats.retries < self._max_retries

    def next_id(self) -> int | None:
        """Returns the id for another instance, counted as a retry; None after the last."""
        if not self.may_go_on:
            return None
        self.stats.retries += 1
        return self.id


def _for_client(error: ServiceError) -> ServiceError:
    """Where in the pools it went wrong is no matter of the client's: the service is unavailable."""
    if isinstance(error, WorkFailed):
        return Unavailable(error.message, reason=error.reason)
    return error
