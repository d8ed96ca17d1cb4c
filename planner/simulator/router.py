"""A router on the virtual clock: the gate, ledger and policy that routers have.

Owns which requests wait at it. What instances do is `planner.simulator.cluster`'s.
"""

from collections.abc import Callable

from planner.simulator.calls import Call
from planner.simulator.clock import Clock
from planner.simulator.setup import Setup
from router.fairness import Tenants
from router.gate import Decision, Gate
from router.ledger import Capacity, InstanceKey, Ledger, Need, Placement
from router.policies import POLICIES
from router.queue import Waiting
from router.views import Pace
from service.errors import ServiceError

_GRACE_S = 5.0
_MAX_BYPASSES = 64


class Router:
    """Places requests on its instances.

    Args:
        send: Called with the number and placement of a request that has its room.
    """

    def __init__(
        self, clock: Clock, setup: Setup, send: Callable[[int, Call, Placement], None]
    ) -> None:
        self._clock = clock
        self._setup = setup
        self._send = send
        self._ledger = Ledger(max_prefill_requests=setup.max_prefill_requests)
        self._gate = Gate(
            ledger=self._ledger,
            policy=POLICIES[setup.policy](),
            tenants=Tenants(),
            max_queue=setup.max_queue,
            max_bypasses=_MAX_BYPASSES,
            grace_s=_GRACE_S,
            refuses_early=False,
        )
        self._waiting: dict[Waiting, Call] = {}

    def add(
        self, prefills: dict[InstanceKey, Capacity], decodes: dict[InstanceKey, Capacity]
    ) -> None:
        """Take instances in."""
        for key, capacity in prefills.items():
            self._ledger.add_prefill(key, capacity)
        for key, capacity in decodes.items():
            self._ledger.add_decode(key, capacity)
        self._gate.instances_changed(self._clock.now)

    def lose(self, key: InstanceKey) -> None:
        """Forget an instance, and all that it held."""
        self._ledger.remove(key)
        self._gate.instances_changed(self._clock.now)
        self._clock.after(_GRACE_S, self._decide)

    def note_pace(self, key: InstanceKey, pace: Pace) -> None:
        """Take in what an instance says of its speed."""
        self._ledger.set_pace(key, pace)

    def come(self, request_id: int, call: Call) -> None:
        """Place a request, at once or when there is room; one that was begun goes ahead."""
        now = self._clock.now
        waiting = Waiting(
            request_id=request_id,
            need=Need(
                prompt_tokens=call.prompt_tokens + call.tokens,
                max_new_tokens=call.output_tokens - call.tokens,
                generated_tokens=call.tokens,
            ),
            priority=0,
            start_by=now + self._setup.max_queue_wait_s,
            resumes=call.tokens > 0,
            again=call.moves > 0,
        )
        self._waiting[waiting] = call
        try:
            decisions = self._gate.offer(waiting, now)
        except ServiceError as exc:
            del self._waiting[waiting]
            call.refused = exc.reason
            return
        self._act_on(decisions)
        self._decide()
        if waiting.is_queued:
            self._clock.at(waiting.start_by, self._decide)

    def end_prefill(self, request_id: int) -> None:
        """Prefill is done with a request."""
        self._gate.end_prefill(request_id, self._clock.now)
        self._decide()

    def release(self, request_id: int) -> None:
        """Free what a request holds."""
        self._gate.release(request_id, self._clock.now)
        self._decide()

    def check_integrity(self) -> None:
        """Raise where the ledger's account is wrong."""
        self._ledger.check_integrity()
        assert len(self._waiting) == len(self._gate.queue)

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits here or holds anything."""
        return self._ledger.is_idle() and not len(self._gate.queue)

    def _decide(self) -> None:
        self._act_on(self._gate.decide(self._clock.now))

    def _act_on(self, decisions: list[Decision]) -> None:
        for waiting, decided in decisions:
            call = self._waiting.pop(waiting)
            if isinstance(decided, ServiceError):
                call.refused = decided.reason
            else:
                self._send(waiting.request_id, call, decided)
