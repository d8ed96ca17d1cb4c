"""Owns the wait for room: joins queue, ledger and policy with the clock and the waiting tasks.

Decisions are the pure parts' own; here they are acted on, one `_pump` after every change.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from router.ledger import (
    DecodeView,
    InstanceKey,
    Ledger,
    Need,
    Placement,
    PrefillView,
)
from router.policy import RoutingPolicy
from router.queue import AdmissionQueue, QueueFull, Waiting
from service.errors import DeadlineExceeded, Refused, ServiceError, Unavailable

# What a client is told to wait when there is no room now: about how long short answers take.
RETRY_AFTER_S = 1.0

_View = TypeVar("_View", DecodeView, PrefillView)


class Room:
    """The room of one moment, as the queue asks about it."""

    def __init__(self, ledger: Ledger, policy: RoutingPolicy) -> None:
        self._ledger = ledger
        self._policy = policy
        self._prefills = ledger.prefills()
        self._decodes = ledger.decodes()

    def place(self, waiting: Waiting) -> Placement | None:
        return self._policy.choose(
            _preferred(self._prefills, waiting.avoid),
            _preferred(self._decodes, waiting.avoid),
            waiting.need,
            waiting.cached_tokens,
        )

    def fits_ever(self, need: Need) -> bool:
        return self._ledger.fits_ever(need)


def _preferred(views: Sequence[_View], avoid: frozenset[InstanceKey]) -> Sequence[_View]:
    return [v for v in views if v.key not in avoid] or views if avoid else views


class Admission:
    """Gives requests their placement, in order, when there is room; all on one event loop.

    `grace_s` is how long a role may be without any instance before its requests fail: long enough
    for a restart. Patient ones wait on, to their own limit.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        queue: AdmissionQueue,
        policy: RoutingPolicy,
        clock: Callable[[], float],
        grace_s: float,
    ) -> None:
        self._ledger = ledger
        self._queue = queue
        self._policy = policy
        self._clock = clock
        self._grace_s = grace_s
        self._futures: dict[Waiting, asyncio.Future[Placement]] = {}
        # When the last instance of a role went away; -inf: there was none ever.
        self._absent_since: dict[str, float | None] = {"prefill": -math.inf, "decode": -math.inf}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def queued(self) -> int:
        return len(self._queue)

    async def admit(self, waiting: Waiting) -> Placement:
        """Waits for room and books it in the ledger under `waiting.request_id`.

        The caller releases the request whatever the outcome. Raises Refused (queue full, waited
        too long, never fits) and Unavailable (a role has no instance).
        """
        now = self._clock()
        if waiting.start_by <= now:
            raise DeadlineExceeded
        if not waiting.patient:
            self._check_places(waiting.need, now)
        try:
            self._queue.push(waiting)
        except QueueFull as exc:
            raise self._refusal("QUEUE_FULL", waiting.need, RETRY_AFTER_S) from exc
        future: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        self._futures[waiting] = future
        try:
            self._pump()
            return await future
        finally:
            self._queue.discard(waiting)
            del self._futures[waiting]

    def has_room(self, need: Need) -> bool:
        """Whether a request could be placed this moment."""
        waiting = Waiting(request_id=0, need=need, priority=0, start_by=0.0)
        return Room(self._ledger, self._policy).place(waiting) is not None

    def place(self, waiting: Waiting) -> Placement | None:
        """Books room that is there this moment, past the queue; None where there is none."""
        placement = Room(self._ledger, self._policy).place(waiting)
        if placement is not None:
            self._book(waiting, placement)
        return placement

    def grow(self, request_id: int, tokens: int) -> None:
        """A sequence at decode has come to so many tokens."""
        self._ledger.grow(request_id, tokens)

    def end_prefill(self, request_id: int) -> None:
        self._ledger.end_prefill(request_id)
        self._pump()

    def release(self, request_id: int) -> None:
        """Frees what the request holds, at any moment and as often as one likes."""
        self._ledger.release(request_id)
        self._pump()

    def instances_changed(self) -> None:
        """To be called after every change of the ledger's instances."""
        now = self._clock()
        for role, views in (
            ("prefill", self._ledger.prefills()),
            ("decode", self._ledger.decodes()),
        ):
            if views:
                self._absent_since[role] = None
            elif self._absent_since[role] is None:
                self._absent_since[role] = now
        self._pump()

    def fail_all(self, error: Callable[[], ServiceError]) -> None:
        """Ends the wait of every queued request."""
        for waiting in self._queue.take(lambda _: True):
            self._fail(waiting, error())

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- acting on decisions

    def _pump(self) -> None:
        """Acts on what has changed; costs next to nothing while nobody waits."""
        if not len(self._queue):
            return
        now = self._clock()
        for waiting in self._queue.take_expired(now):
            self._fail(waiting, self._refusal("QUEUE_WAIT", waiting.need, RETRY_AFTER_S))
        self._fail_the_placeless(now)
        while self._admit_next():
            pass
        self._set_timer(now)

    def _admit_next(self) -> bool:
        found = self._queue.next_admissible(Room(self._ledger, self._policy))
        if found is None:
            return False
        waiting, placement = found
        future = self._futures[waiting]
        if not future.done():  # else its task was cancelled and has not run since
            self._book(waiting, placement)
            future.set_result(placement)
        return True

    def _book(self, waiting: Waiting, placement: Placement) -> None:
        if not self._ledger.try_reserve(waiting.request_id, waiting.need, placement):
            raise AssertionError("the policy chose a placement that the ledger refuses")

    def _fail(self, waiting: Waiting, error: ServiceError) -> None:
        future = self._futures[waiting]
        if not future.done():
            future.set_exception(error)

    def _fail_the_placeless(self, now: float) -> None:
        if all(since is None for since in self._absent_since.values()):
            return
        for waiting in self._queue.take(
            lambda w: not w.patient and self._missing_role(w.need, now) is not None
        ):
            missing = self._missing_role(waiting.need, now)
            assert missing is not None
            self._fail(waiting, _no_instance(missing))

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        expiry = self._queue.next_expiry()
        if expiry is None:
            return
        ends_of_grace = [s + self._grace_s for s in self._absent_since.values() if s is not None]
        moments = [expiry, *(moment for moment in ends_of_grace if moment > now)]
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, min(moments) - now), self._pump)

    # ---- questions

    def _check_places(self, need: Need, now: float) -> None:
        """Raises where no instance of now, or of a moment ago, could ever take the request."""
        missing = self._missing_role(need, now)
        if missing is not None:
            raise _no_instance(missing)
        if self._is_complete(need) and not self._ledger.fits_ever(need):
            raise self._refusal("NEVER_FITS", need, retry_after_s=None)

    def _missing_role(self, need: Need, now: float) -> str | None:
        for role in ("prefill", "decode") if need.decodes else ("prefill",):
            since = self._absent_since[role]
            if since is not None and since + self._grace_s <= now:
                return role
        return None

    def _is_complete(self, need: Need) -> bool:
        roles = ("prefill", "decode") if need.decodes else ("prefill",)
        return all(self._absent_since[role] is None for role in roles)

    def _refusal(self, reason: str, need: Need, retry_after_s: float | None) -> Refused:
        free = max(
            (max(0, d.free_blocks) * d.capacity.block_size for d in self._ledger.decodes()),
            default=0,
        )
        return Refused(reason, needed=need.total_tokens, free=free, retry_after_s=retry_after_s)


def _no_instance(role: str) -> Unavailable:
    return Unavailable(
        f"no {role} instance is registered with this router",
        reason="NO_INSTANCE",
        retry_after_s=RETRY_AFTER_S,
    )
