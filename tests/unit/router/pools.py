"""Pools on a virtual clock, around a gate: what comes when, how long it takes, how it ended."""

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from router.fairness import Tenants
from router.gate import Decision, Gate
from router.ledger import Capacity, InstanceKey, Ledger, Need, Placement
from router.policies.least_loaded import LeastLoaded
from router.queue import Waiting
from service.errors import ServiceError

PREFILL = InstanceKey("prefill", 1)
DECODE = InstanceKey("decode", 1)


@dataclass(kw_only=True)
class Call:
    """One request and what became of it; times in virtual seconds."""

    tenant: str
    came_at: float
    start_by: float
    need: Need
    output_tokens: int
    placed_at: float | None = None
    prefill_at: float | None = None
    ended_at: float | None = None
    refused_at: float | None = None
    reason: str = ""

    @property
    def started_in_time(self) -> bool:
        return self.prefill_at is not None and self.prefill_at <= self.start_by

    @property
    def wait_s(self) -> float:
        assert self.placed_at is not None
        return self.placed_at - self.came_at


class Pools:
    """One prefill instance that computes prompts in turn, and one decode instance."""

    def __init__(
        self,
        *,
        blocks: int = 1024,
        sequences: int = 64,
        prefill_tokens_per_s: float = 20_000.0,
        token_s: float = 0.02,
        max_queue: int = 256,
        tenants: Tenants | None = None,
        refuses_early: bool = True,
    ) -> None:
        self.ledger = Ledger(max_prefill_requests=256)
        capacity = Capacity(
            blocks=blocks, block_size=16, max_sequences=sequences, max_sequence_tokens=1 << 20
        )
        self.ledger.add_prefill(PREFILL, capacity)
        self.ledger.add_decode(DECODE, capacity)
        self.gate = Gate(
            ledger=self.ledger,
            policy=LeastLoaded(),
            tenants=tenants or Tenants(),
            max_queue=max_queue,
            max_bypasses=16,
            grace_s=5.0,
            refuses_early=refuses_early,
        )
        self.now = 0.0
        self.gate.instances_changed(self.now)
        self.calls: list[Call] = []
        self._tokens_per_s = prefill_tokens_per_s
        self._token_s = token_s
        self._prefill_free_at = 0.0
        self._of: dict[Waiting, Call] = {}
        self._ids = itertools.count(1)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, moment: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._order), happens))

    def run(self, until: float) -> None:
        """Lets time pass."""
        while True:
            wake = self.gate.next_moment(self.now)
            next_event = self._events[0][0] if self._events else until
            moment = min(until, next_event, wake if wake is not None else until)
            self.now = max(self.now, moment)
            if moment >= until:
                return
            if self._events and next_event <= moment:
                heapq.heappop(self._events)[2]()
            self._act_on(self.gate.decide(self.now))

    def come(self, call: Call, priority: int = 0) -> None:
        """Has a request come this moment."""
        waiting = Waiting(
            request_id=next(self._ids),
            need=call.need,
            priority=priority,
            tenant=call.tenant,
            start_by=call.start_by,
        )
        self.calls.append(call)
        self._of[waiting] = call
        try:
            self._act_on(self.gate.offer(waiting, self.now))
        except ServiceError as error:
            self._refuse(waiting, error)
        self._act_on(self.gate.decide(self.now))

    def _act_on(self, decisions: list[Decision]) -> None:
        for waiting, decided in decisions:
            if isinstance(decided, Placement):
                self._begin(waiting)
            else:
                self._refuse(waiting, decided)

    def _refuse(self, waiting: Waiting, error: ServiceError) -> None:
        call = self._of.pop(waiting)
        call.refused_at, call.reason = self.now, error.reason

    def _begin(self, waiting: Waiting) -> None:
        call = self._of.pop(waiting)
        call.placed_at = self.now
        call.prefill_at = max(self.now, self._prefill_free_at)
        self._prefill_free_at = call.prefill_at + call.need.prompt_tokens / self._tokens_per_s
        self.at(self._prefill_free_at, lambda: self.gate.end_prefill(waiting.request_id, self.now))

        def end() -> None:
            call.ended_at = self.now
            self.gate.release(waiting.request_id, self.now)

        self.at(self._prefill_free_at + call.output_tokens * self._token_s, end)


def arrivals(rng: random.Random, per_s: float, until: float) -> Iterator[float]:
    """Gives the moments of a Poisson process."""
    moment = 0.0
    while (moment := moment + rng.expovariate(per_s)) < until:
        yield moment
