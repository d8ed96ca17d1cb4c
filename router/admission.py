"""Owns the wait for room: joins the gate with the clock and the waiting tasks.

Decisions are the gate's; here they are acted on, one `_pump` after every change.
"""

import asyncio
from collections.abc import Callable, Iterable
from itertools import islice

from router.gate import Decision, Gate
from router.ledger import InstanceKey, Need, Placement
from router.metrics.admission import AdmissionMetrics
from router.queue import Waiting
from service.errors import Refused, ServiceError


class Admission:
    """Gives requests their placement, in order, when there is room; all on one event loop."""

    def __init__(
        self, *, gate: Gate, metrics: AdmissionMetrics, clock: Callable[[], float]
    ) -> None:
        self._gate = gate
        self.local = gate.local
        self.learns_lengths = gate.lengths.is_on
        self._metrics = metrics
        self._clock = clock
        self._futures: dict[Waiting, asyncio.Future[Placement]] = {}
        self._timer: asyncio.TimerHandle | None = None
        # Called after whatever changes what is held or waited for, before it is decided upon.
        self.on_change: Callable[[], None] = lambda: None

    @property
    def queued(self) -> int:
        return len(self._gate.queue)

    def waiting_for_decode(self, most: int) -> list[Need]:
        """Returns the needs of the first so many that wait, in order, and take part at decode."""
        return [waiting.need for waiting in islice(self._gate.queue, most) if waiting.need.decodes]

    def check_queue(self, tenant: str, priority: int, needed: int) -> None:
        """Raises Refused where a new request would find the queue full, before it costs anything.

        `needed` are the tokens that it is known to ask for.
        """
        try:
            self._gate.check_queue(tenant, priority, needed)
        except Refused as exc:
            self._metrics.ended("refused", exc.reason)
            raise

    async def admit(self, waiting: Waiting, now: float) -> Placement:
        """Waits for room and books it in the ledger under `waiting.request_id`.

        `now` is when it was asked for: it is tried once, however late that comes. The caller
        releases the request whatever the outcome. Raises Refused (a cap, queue full, waited too
        long, would wait too long, never fits) and Unavailable (a role has no instance).
        """
        try:
            placement = await self._admit(waiting, now)
        except ServiceError as exc:
            self._metrics.ended("refused", exc.reason)
            raise
        except asyncio.CancelledError:
            self._metrics.ended("left")
            raise
        self._metrics.ended("admitted")
        if waiting.predicted_s is not None:
            waited_s = self._clock() - waiting.came_at
            self._metrics.foretold(waiting.predicted_s, waited_s)
        return placement

    async def _admit(self, waiting: Waiting, now: float) -> Placement:
        self._act_on(self._gate.offer(waiting, now))
        future: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        self._futures[waiting] = future
        try:
            self._pump(now)
            return await future
        finally:
            was_waiting = waiting.is_queued
            self._gate.withdraw(waiting)
            del self._futures[waiting]
            if was_waiting:  # it was cancelled, and may have held others back
                self._pump()

    def has_room(self, tenant: str, need: Need) -> bool:
        """Whether a request could be placed this moment."""
        return self._gate.has_room(tenant, need)

    def place(self, waiting: Waiting) -> Placement | None:
        """Books room that is there this moment, past the queue; None where there is none."""
        placement = self._gate.place(waiting, self._clock())
        if placement is not None:
            self._note_booked(waiting)
        return placement

    def _note_booked(self, waiting: Waiting) -> None:
        if self._gate.is_overcommitted(waiting.request_id):
            self._metrics.overcommitted()

    def grow(self, request_id: int, tokens: int) -> None:
        """A sequence at decode has come to so many tokens."""
        if self._gate.grow(request_id, tokens, self._clock()):
            self._metrics.outgrown()

    def finished(self, tenant: str, need: Need, tokens: int, *, is_cut: bool) -> None:
        """A whole answer has so many tokens; `is_cut`: it would have been longer."""
        if need.sure_new_tokens < need.max_new_tokens:
            self._gate.lengths.finished(tenant, tokens, is_cut=is_cut)

    def overcommit_risks(self) -> dict[InstanceKey, float]:
        """How likely the sequences are to need more than there is, where not all is booked."""
        return self._gate.overcommit_risks()

    def end_prefill(self, request_id: int) -> None:
        self._gate.end_prefill(request_id, self._clock())
        self._pump()

    def release(self, request_id: int) -> None:
        """Frees what the request holds, at any moment and as often as one likes."""
        self._gate.release(request_id, self._clock())
        self._pump()

    def instances_changed(self) -> None:
        """To be called after every change of the ledger's instances."""
        self._gate.instances_changed(self._clock())
        self._pump()

    def room_came_back(self) -> None:
        """To be called where the ledger's instances have more room, given back by others."""
        self._gate.room_came_back()
        self._pump()

    def fail_all(self, error: Callable[[], ServiceError]) -> None:
        """Ends the wait of every queued request."""
        self._act_on(self._gate.end_all(error))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- acting on decisions

    def _pump(self, now: float | None = None) -> None:
        """Acts on what has changed; costs next to nothing while nobody waits."""
        self.on_change()
        if not self.queued:
            return
        now = self._clock() if now is None else now
        self._act_on(self._gate.decide(now))
        self._set_timer(now)

    def _act_on(self, decisions: Iterable[Decision]) -> None:
        for waiting, decided in decisions:
            future = self._futures[waiting]
            if future.done():
                continue  # its task was cancelled and has not run since; it gives back what it got
            if isinstance(decided, Placement):
                self._note_booked(waiting)
                future.set_result(decided)
            else:
                future.set_exception(decided)

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        moment = self._gate.next_moment(now)
        if moment is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, moment - now), self._pump)
