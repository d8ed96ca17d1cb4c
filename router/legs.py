"""Owns how a try comes by legs at prefill instances: the first one, another one, one beside it."""

import logging
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from router.admission import Admission
from router.events import TRANSFER_LOST, PrefillEvent
from router.ledger import InstanceKey, Need, Placement
from router.metrics.admission import AdmissionMetrics
from router.pools import Pools
from router.prefill_leg import PrefillLeg
from router.queue import Waiting
from router.request import ValidRequest
from router.tasks import Tasks
from router.workers import cp_first
from service.errors import ServiceError, Unavailable

_log = logging.getLogger(__name__)


class Legs:
    """Opens and closes the legs of one try; what happens at them goes to `inbox`.

    They send to `decode`; None: there is nothing to send.
    `next_id` gives the id for another leg, or None where there have been enough, and `hedge_id`
    that for one beside the first.
    """

    def __init__(
        self,
        request: ValidRequest,
        *,
        pools: Pools,
        admission: Admission,
        metrics: AdmissionMetrics,
        tasks: Tasks,
        deadline: float,
        clock: Callable[[], float],
        next_id: Callable[[], int | None],
        hedge_id: Callable[[], int | None],
        decode: InstanceKey | None,
        inbox: Callable[[PrefillLeg, PrefillEvent], None],
    ) -> None:
        self._request = request
        self._pools = pools
        self._admission = admission
        self._metrics = metrics
        self._tasks = tasks
        self._deadline = deadline
        self._clock = clock
        self._next_id = next_id
        self._hedge_id = hedge_id
        self._decode = decode
        self._inbox = inbox
        self._lost: set[InstanceKey] = set()
        self._could_not_send: set[InstanceKey] = set()
        self._handed_over: PrefillLeg | None = None

    def remaining_s(self) -> float:
        return max(0.001, self._deadline - self._clock())

    def open(self, leg_id: int, placement: Placement) -> PrefillLeg:
        """Raises Unavailable where the instance has gone."""
        assert placement.prefill is not None
        link = self._pools.prefill(placement.prefill)
        first = placement.cp_first
        return PrefillLeg(
            leg_id,
            link,
            self._request,
            cp_first=cp_first(link.instance, self._request) if first is None else first,
            transfer=self._decode is not None,
            remaining_s=self.remaining_s(),
            inbox=self._inbox,
        )

    async def another(self) -> PrefillLeg:
        """Waits for room at an instance, rather than at one that was lost; raises ServiceError."""
        leg_id = self._next_id()
        if leg_id is None:
            raise Unavailable("no more tries", reason="RETRIES_EXHAUSTED")
        try:
            placement = await self._admission.admit(
                self._waiting(leg_id, self._lost), self._clock()
            )
            self._metrics.placed(placement.cached_tokens)
            return self.open(leg_id, placement)
        except BaseException:
            self._admission.release(leg_id)
            raise

    def beside(self, leg: PrefillLeg) -> PrefillLeg | None:
        """Opens a leg at another instance than this one's, if one has room this moment."""
        leg_id = self._hedge_id()
        if leg_id is None:
            return None
        placement = self._admission.place(self._waiting(leg_id, {leg.key}))
        if placement is None:
            return None
        try:
            if placement.prefill != leg.key:
                opened = self.open(leg_id, placement)
                self._metrics.placed(placement.cached_tokens)
                return opened
        except ServiceError as exc:
            _log.debug("the instance has gone this moment: %s", exc.reason)
        self._admission.release(leg_id)
        return None

    def _waiting(self, leg_id: int, avoid: AbstractSet[InstanceKey]) -> Waiting:
        """Returns what waits for the room of a prefill instance alone."""
        return Waiting(
            request_id=leg_id,
            need=Need(prompt_tokens=len(self._request.prompt_token_ids), max_new_tokens=1),
            priority=self._request.priority,
            tenant=self._request.tenant,
            start_by=self._deadline,
            cached_tokens=self._pools.prefixes.lookup(self._request),
            avoid=frozenset(avoid),
            resumes=True,
        )

    def note_handed_over(self, leg: PrefillLeg | None, handoff_s: float | None = None) -> None:
        """Decode has all that a leg was to send, maybe so long after the end of its compute."""
        if leg is None or self._decode is None:
            return
        if handoff_s is not None:
            self._admission.local.sent(leg.key, handoff_s)
        if leg is not self._handed_over:
            self._handed_over = leg
            self._pools.handed_over(leg.key, self._decode)

    def note_lost(self, leg: PrefillLeg, error: ServiceError) -> None:
        """A leg has failed, or what it sends is lost on the way."""
        self._lost.add(leg.key)
        self._pools.suspect(leg.key)
        if error.reason in TRANSFER_LOST and self._decode is not None:
            self._could_not_send.add(leg.key)
            self._pools.lost_transfer(leg.key, self._decode)
        else:
            self._pools.failed(leg.key)

    @property
    def several_could_not_send(self) -> bool:
        """Whether what legs at different instances sent to this decode instance was lost."""
        return len(self._could_not_send) > 1

    def close(self, leg: PrefillLeg, *, is_finished: bool) -> None:
        """Gives back what a leg holds; its instance's word on that is waited for elsewhere."""
        self._admission.end_prefill(leg.leg_id)
        self._pools.ended(leg.key)
        leg.close(self._tasks, is_finished=is_finished)
