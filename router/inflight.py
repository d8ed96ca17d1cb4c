"""Owns the life of a request in the router: its place, its tries, its answer, its deadline.

One coroutine for each request; cancelling it is the abort. It never waits for the client: what a
slow one has not taken yet is bounded by max_new_tokens, and a deadline ends the work all the same.
"""

import asyncio
import dataclasses
import logging
import random
import time
from collections.abc import Callable

from router.admission import Admission
from router.attempt import Attempt
from router.carried import Carried
from router.departure import Departure
from router.events import TRANSFER_LOST
from router.hedging import Hedging
from router.ledger import InstanceKey, Need, Placement
from router.membership import Model
from router.metrics import Metrics
from router.pools import Pools, model_changed
from router.progress import TRY_BITS, Progress
from router.queue import Waiting
from router.request import AnswerPart, Finish, Resumed, Stats, Tokens, ValidRequest
from router.reserving import PREEMPTED
from router.tasks import Tasks
from router.tries import Try
from service.errors import (
    DeadlineExceeded,
    Incompatible,
    InvalidRequest,
    Refused,
    ServiceError,
    Unavailable,
    WorkFailed,
)
from text import Tokenizer

Emit = Callable[[AnswerPart], None]

# From so many tokens to go on, a request does not wait for its draining instance to hand it back,
# but is carried over while others have room, and the instance may go sooner. One with fewer is
# likely to end first.
_WORTH_MOVING_TOKENS = 32
# How often a try asks for its sequence to be carried over, where that goes wrong.
_MOST_CARRIES = 3
# What a draining instance says when it refuses a request, and when it hands one back: once each,
# since from there on the router knows.
_DRAINS = ("DRAINING", "DRAINED")
# What is said where others have the room: the instance does its work.
_NO_FAULTS = frozenset({"SEQUENCES_FULL", "KV_BLOCKS_FULL", "PREFILL_QUEUE_FULL", "NO_RUN_STREAM"})
_RETRY_BACKOFF_S = 0.05
# How many tokens of an answer that another router began are gone over at once.
_REPLAY_TOKENS = 256
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
    resumed: Resumed | None = None

    @property
    def shown_id(self) -> str:
        """The id as clients and logs see it.

        An answer that another router began keeps the one it had. In the pools it has a new one,
        since what that router did there may not have ended yet.
        """
        return self.resumed.request_id if self.resumed is not None else f"{self.request_id:016x}"


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
        wall_ns: Callable[[], int] = time.time_ns,
        hedging: Hedging | None = None,
    ) -> None:
        self._hedging = hedging or Hedging()
        self._pools = pools
        self._admission = admission
        self._metrics = metrics
        self._max_queue_wait_s = max_queue_wait_s
        self._max_retries = max_retries
        self._clock = clock
        self._rng = rng
        self._wall_ns = wall_ns
        self._tasks = Tasks()

    def new_request_id(self) -> int:
        return self._rng.getrandbits(64 - TRY_BITS) << TRY_BITS

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
        run = Progress(
            job.request_id,
            dataclasses.replace(job.request, came_us=self._wall_ns() // 1000),
            job.tokenizer,
            stats,
            max_retries=self._max_retries,
            clock=self._clock,
        )
        if job.resumed is not None:
            await self._replay(job, job.resumed, run)
        following: Try | None = self._attempt(job, run, await self._admit(job, run))
        while following is not None:
            attempt, failed = following, False
            try:
                attempt.start()
                following = await self._relay(job, attempt, run, emit)
            except ServiceError as exc:
                self._go_on(job, run, attempt, exc)
                failed = True
            finally:
                attempt.close()
            if failed:
                await asyncio.sleep(_RETRY_BACKOFF_S * run.fruitless)
                following = self._attempt(job, run, await self._admit(job, run))

    async def _replay(self, job: Job, resumed: Resumed, run: Progress) -> None:
        """Brings an answer to where its client has it, text and all; Incompatible where it cannot.

        Other requests have their turns meanwhile.
        """
        chars, token_ids = 0, resumed.output_token_ids
        for start in range(0, len(token_ids), _REPLAY_TOKENS):
            part = run.replay(token_ids[start : start + _REPLAY_TOKENS])
            chars += len(part.text)
            if part.finish is not None:
                raise InvalidRequest(
                    "resume.output_token_ids",
                    "an answer that has ended",
                    "a stop string is in it: nothing is to be gone on with",
                )
            await asyncio.sleep(0)
        if chars != resumed.text_chars:
            raise Incompatible(
                f"the answer cannot go on here: its {len(token_ids)} tokens are {chars} characters"
                f" of text here, and were {resumed.text_chars}",
                reason="RESUME_MISMATCH",
            )
        run.resume()
        run.goes_ahead = resumed.goes_ahead
        self._metrics.survival.taken_over()
        _log.info(
            "goes on after %d tokens of another router, in the pools as %016x",
            len(token_ids),
            job.request_id,
            extra={"request_id": job.shown_id},
        )

    # ---- beginning a try

    def _check_model(self, model: Model) -> None:
        """A prompt's tokens are those of the model that was served when it came."""
        now = self._pools.members.model
        if now is None or now.fingerprint != model.fingerprint:
            raise model_changed()

    async def _admit(self, job: Job, run: Progress) -> Placement:
        """Waits for room for the next try and books it."""
        self._check_model(job.model)
        asked_at = self._clock()
        start_by = min(job.deadline, asked_at + self._max_queue_wait_s)
        if _is_preempted(run.error):
            # Its room is sure to come: those that it was handed back for end.
            start_by = job.deadline
        waiting = self._waiting(run, run.request.need, start_by)
        try:
            placement = await self._admission.admit(waiting, asked_at)
        except BaseException as exc:
            # It may have been cancelled in the very moment that room was found.
            self._admission.release(waiting.request_id)
            if not isinstance(exc, ServiceError):
                raise
            if self._is_over(job.deadline):
                raise DeadlineExceeded from exc
            if run.error is not None and run.has_begun:
                raise _for_client(run.error, has_begun=True) from exc
            raise
        waited_s = self._clock() - asked_at
        run.goes_ahead = True
        run.stats.queue_s += waited_s
        run.stats.admit_s += waited_s
        self._metrics.admission.waited(waited_s, run.request.priority)
        return placement

    def _waiting(self, run: Progress, need: Need, start_by: float) -> Waiting:
        return Waiting(
            request_id=run.id,
            need=need,
            priority=run.request.priority,
            tenant=run.request.tenant,
            start_by=start_by,
            cached_tokens=self._pools.prefixes.lookup(run.request),
            avoid=run.avoid,
            resumes=(run.has_begun and run.goes_ahead) or _is_preempted(run.error),
            patient=run.has_begun or _is_preempted(run.error),
            again=run.error is not None,
            is_new_here=run.error is None,
        )

    def _attempt(self, job: Job, run: Progress, placement: Placement) -> Try:
        self._metrics.admission.placed(placement.cached_tokens)
        return Attempt(
            run.id,
            run.request,
            placement,
            pools=self._pools,
            admission=self._admission,
            metrics=self._metrics,
            tasks=self._tasks,
            stats=run.stats,
            deadline=job.deadline,
            clock=self._clock,
            next_id=run.next_id,
            hedge_id=run.hedge_id,
            hedging=self._hedging,
        )

    # ---- a try

    async def _relay(self, job: Job, attempt: Try, run: Progress, emit: Emit) -> Try | None:
        """Gives out a try's tokens; returns the try that goes on from there, None at the end."""
        asks = _MOST_CARRIES
        carried: Carried | None = None
        departure: Departure | None = None

        def past(tokens: Tokens) -> bool:
            if run.may_stop or self._drains(attempt):
                return False
            self._give(tokens, run, emit)
            return True

        attempt.past = past
        try:
            while True:
                tokens = await attempt.next_tokens()
                if tokens is None:
                    assert carried is not None
                    assert departure is not None
                    if await self._carry(job, run, departure, carried):
                        gone_to, carried = carried, None
                        return gone_to
                    carried.close()
                    carried = None
                    attempt.stay()
                    continue
                if self._give(tokens, run, emit):
                    return None
                if carried is None and asks and self._drains(attempt):
                    carried = self._room_elsewhere(job, run)
                    # Where there is none, it stays, and is handed back if it does not end in time.
                    asks = asks - 1 if carried is not None else 0
                    departure = attempt.depart() if carried is not None else None
        finally:
            attempt.past = None
            if carried is not None:
                carried.close()

    def _give(self, tokens: Tokens, run: Progress, emit: Emit) -> bool:
        """Gives tokens out; returns whether they are the last."""
        part, pause_s = run.push(tokens)
        if pause_s is not None:
            self._metrics.survival.paused(pause_s, run.way)
        emit(part)
        if part.finish is None:
            return False
        request = run.request
        self._admission.finished(
            request.tenant,
            request.need,
            part.completion_tokens,
            is_cut=part.finish is Finish.LENGTH,
        )
        return True

    def _drains(self, attempt: Try) -> bool:
        """Whether a try's decode instance drains that has given tokens."""
        key = attempt.decode_key
        return attempt.has_output and key is not None and self._pools.drains(key)

    # ---- off a draining instance

    def _room_elsewhere(self, job: Job, run: Progress) -> Carried | None:
        """Books room for a sequence at another decode instance, if there is any this moment."""
        need = run.continuation.need
        if need.max_new_tokens < _WORTH_MOVING_TOKENS or not self._admission.has_room(
            run.request.tenant, need
        ):
            return None
        request_id = run.begin_carry()
        if request_id is None:
            return None
        placement = self._admission.place(self._waiting(run, need, start_by=0.0))
        if placement is None or placement.decode is None:
            return None
        self._admission.end_prefill(request_id)  # which has no part in it
        return Carried(
            request_id,
            placement.decode,
            placement.dp_rank,
            pools=self._pools,
            admission=self._admission,
            tasks=self._tasks,
            stats=run.stats,
            deadline=job.deadline,
            clock=self._clock,
        )

    async def _carry(self, job: Job, run: Progress, departure: Departure, carried: Carried) -> bool:
        """Has a paused sequence go on where its room is; returns whether it does."""
        run.pause()
        try:
            await carried.bring(departure, run.cached, run.last_token_id)
        except ServiceError as exc:
            if carried.suspect is not None:
                self._doubt(carried.suspect, exc)
            self._metrics.survival.carried("stayed")
            _log.info("not carried over: %s", exc.message, extra={"request_id": job.shown_id})
            return False
        run.carried()
        self._metrics.survival.moved("drained", "kv")
        self._metrics.survival.carried("carried", carried.kv_bytes)
        _log.info("carried over", extra={"request_id": job.shown_id})
        return True

    def _doubt(self, key: InstanceKey, error: ServiceError) -> None:
        """Gives nothing new to an instance that drains, or nothing until it has answered."""
        self._pools.suspect(key)
        if error.reason in _DRAINS:
            self._pools.note_drain(key)
        elif error.reason not in _NO_FAULTS | TRANSFER_LOST:
            self._pools.failed(key)

    # ---- the end of a try

    def _go_on(self, job: Job, run: Progress, attempt: Try, error: ServiceError) -> None:
        """Makes ready for another try where there may be one, else raises what the client gets."""
        if self._is_over(job.deadline):
            raise DeadlineExceeded from error
        if not error.retryable:
            raise _for_client(error, has_begun=run.has_begun) from error
        if attempt.suspect is not None:
            self._doubt(attempt.suspect, error)
        drains = error.reason in _DRAINS
        is_failure = not drains and not _is_preempted(error)
        moves = run.go_on(by_decode=attempt.has_output, is_failure=is_failure)
        if moves is None:
            raise _for_client(error, has_begun=run.has_begun) from error
        run.error = error
        if attempt.suspect is not None:
            run.avoid |= {attempt.suspect}
        if moves:
            self._metrics.survival.moved(_why_moved(error))
        else:
            self._metrics.survival.retried()
        _log.info(
            "%s: %s",
            "going on elsewhere" if moves else "starting over",
            error.message,
            extra={"request_id": job.shown_id},
        )

    def _is_over(self, deadline: float) -> bool:
        return self._clock() >= deadline - _DEADLINE_MARGIN_S

    def with_seed(self, request: ValidRequest) -> ValidRequest:
        """Draws a seed where chance plays a part, so that any other try says the same."""
        sampling = request.sampling
        if sampling.seed is not None or sampling.temperature == 0.0:
            return request
        seeded = dataclasses.replace(sampling, seed=self._rng.getrandbits(63))
        return dataclasses.replace(request, sampling=seeded)


def _is_preempted(error: ServiceError | None) -> bool:
    return error is not None and error.reason == PREEMPTED


def _why_moved(error: ServiceError) -> str:
    if error.reason in _DRAINS:
        return "drained"
    if _is_preempted(error):
        return "preempted"
    return "failed" if isinstance(error, WorkFailed) else "lost"


def _for_client(error: ServiceError, *, has_begun: bool) -> ServiceError:
    """Where in the pools it went wrong is no matter of the client's: the service is unavailable.

    Nor can it send the request anew, after half of an answer, as one that was refused could be.
    """
    is_ours = isinstance(error, WorkFailed) and error.retryable
    if is_ours or (has_begun and isinstance(error, Refused)):
        return Unavailable(error.message, reason=error.reason)
    return error
