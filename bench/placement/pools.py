"""Pools on a virtual clock around the router's own gate, ledger and policy.

Owns what instances would take for their work, their prefix caches and what they report. Prefill
computes prompts one after another, decode steps through all of its sequences; the KV goes from one
to the other as fast as the way between them allows.
"""

import heapq
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.placement.traces import BLOCK, Arrival
from router.fairness import Tenants
from router.gate import Decision, Gate
from router.ledger import Capacity, InstanceKey, Ledger, Need, Placement
from router.policy import RoutingPolicy
from router.queue import Waiting
from router.views import AskEach, Link, Pace
from service.errors import ServiceError
from service.step_fit import StepFit, StepSpeed

_HEARTBEAT_S = 1.0
_GRAIN = 16
_FAR_S = 1e9


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What there is: the true speed of each instance, the ways between them, and their room.

    `cached_blocks` of a trace are what an instance remembers.
    """

    prefills: tuple[StepSpeed, ...]
    decodes: tuple[StepSpeed, ...]
    bytes_per_s: tuple[tuple[float, ...], ...]
    room_tokens: int
    max_sequences: int
    token_bytes: int = 1 << 17
    cached_blocks: int = 2000


@dataclass(kw_only=True)
class Call:
    """One request and what became of it; times in virtual seconds."""

    arrival: Arrival
    tenant: str
    need: Need
    first_at: float | None = None
    ended_at: float | None = None
    cached_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Arrival to first token."""
        assert self.first_at is not None
        return self.first_at - self.arrival.at_s

    @property
    def tpot_s(self) -> float:
        """Time for each token after the first."""
        assert self.first_at is not None
        assert self.ended_at is not None
        return (self.ended_at - self.first_at) / max(1, self.arrival.output_tokens - 1)

    @property
    def attains(self) -> bool:
        """Whether both limits were kept."""
        return (
            self.ended_at is not None
            and self.ttft_s <= self.need.ttft_s
            and (self.arrival.output_tokens == 1 or self.tpot_s <= self.need.tpot_s)
        )


@dataclass
class _Cache:
    """The blocks that an instance has, the one that was used least recently to go first."""

    most: int
    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def tokens(self, blocks: tuple[int, ...]) -> int:
        known = 0
        for block in blocks:
            if block not in self.blocks:
                break
            known += 1
        return known * BLOCK

    def remember(self, blocks: tuple[int, ...]) -> None:
        for block in reversed(blocks):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.most:
            self.blocks.popitem(last=False)


@dataclass
class _Prefill:
    speed: StepSpeed
    cache: _Cache
    queue: deque[tuple[int, Call, Placement]] = field(default_factory=deque)
    fit: StepFit = field(default_factory=lambda: StepFit(has_base=False))
    busy: bool = False


@dataclass
class _Decode:
    """`ends` are by the number of the step after which a sequence is over."""

    speed: StepSpeed
    cache: _Cache
    fit: StepFit = field(default_factory=StepFit)
    steps: int = 0
    joining: list[tuple[int, Call]] = field(default_factory=list)
    ends: list[tuple[int, int, Call]] = field(default_factory=list)
    tokens: int = 0
    busy: bool = False


class Replay:
    """Requests of a trace, at the moments that they came, through a policy."""

    def __init__(self, cluster: Cluster, policy: RoutingPolicy, seed: int = 0) -> None:
        self._cluster = cluster
        self._rng = random.Random(seed)
        self._ledger = Ledger(max_prefill_requests=256)
        capacity = Capacity(
            blocks=cluster.room_tokens // _GRAIN,
            block_size=_GRAIN,
            max_sequences=cluster.max_sequences,
            max_sequence_tokens=1 << 20,
            token_bytes=cluster.token_bytes,
        )
        self._prefills = {
            InstanceKey(f"prefill-{i}", 1): _Prefill(speed, _Cache(cluster.cached_blocks))
            for i, speed in enumerate(cluster.prefills)
        }
        self._decodes = {
            InstanceKey(f"decode-{i}", 1): _Decode(speed, _Cache(cluster.cached_blocks))
            for i, speed in enumerate(cluster.decodes)
        }
        for key in self._prefills:
            self._ledger.add_prefill(key, capacity)
        for key in self._decodes:
            self._ledger.add_decode(key, capacity)
        self._gate = Gate(
            ledger=self._ledger,
            policy=policy,
            tenants=Tenants(),
            max_queue=1 << 20,
            max_bypasses=64,
            grace_s=5.0,
            refuses_early=False,
        )
        self._now = 0.0
        self._gate.instances_changed(self._now)
        self._of: dict[Waiting, Call] = {}
        self._ids = itertools.count(1)
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._open = 0

    def run(self, calls: list[Call]) -> None:
        """Let all of them come and end."""
        self._open = len(calls)
        for call in calls:
            self._at(call.arrival.at_s, lambda call=call: self._come(call))  # type: ignore[misc]
        self._at(0.0, self._beat)
        while self._events and self._open:
            self._now, _, happens = heapq.heappop(self._events)
            happens()
            self._act_on(self._gate.decide(self._now))
        self._ledger.check_integrity()

    def _at(self, moment: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._order), happens))

    def _beat(self) -> None:
        """Have all instances report."""
        names = [key.name for key in self._decodes]
        for row, (key, prefill) in zip(
            self._cluster.bytes_per_s, self._prefills.items(), strict=True
        ):
            links = {name: Link(rate, 1e-4) for name, rate in zip(names, row, strict=True)}
            self._ledger.set_pace(key, Pace(speed=prefill.fit.speed, links=links))
        for key, decode in self._decodes.items():
            self._ledger.set_pace(key, Pace(speed=decode.fit.speed))
        self._at(self._now + _HEARTBEAT_S, self._beat)

    def _come(self, call: Call) -> None:
        def cached_tokens(key: InstanceKey, dp_rank: int = 0) -> int:
            cache = (self._prefills.get(key) or self._decodes[key]).cache
            return min(cache.tokens(call.arrival.blocks), call.need.prompt_tokens - 1)

        waiting = Waiting(
            request_id=next(self._ids),
            need=call.need,
            priority=0,
            tenant=call.tenant,
            start_by=_FAR_S,
            cached_tokens=AskEach(cached_tokens),
        )
        self._of[waiting] = call
        self._act_on(self._gate.offer(waiting, self._now))

    def _act_on(self, decisions: list[Decision]) -> None:
        for waiting, decided in decisions:
            call = self._of.pop(waiting)
            assert not isinstance(decided, ServiceError)
            assert decided.prefill is not None  # decode computes no prompts here
            prefill = self._prefills[decided.prefill]
            prefill.queue.append((waiting.request_id, call, decided))
            self._compute(prefill)

    # ---- prefill

    def _compute(self, prefill: _Prefill) -> None:
        if prefill.busy or not prefill.queue:
            return
        prefill.busy = True
        request_id, call, placement = prefill.queue.popleft()
        blocks, prompt = call.arrival.blocks, call.need.prompt_tokens
        call.cached_tokens = min(prefill.cache.tokens(blocks), prompt - 1)
        tokens = prompt - call.cached_tokens
        seconds = self._about(prefill.speed.base_s + tokens * prefill.speed.token_s)

        def done() -> None:
            prefill.busy = False
            prefill.fit.observe(1, tokens, seconds)
            prefill.cache.remember(blocks)
            call.first_at = self._now
            self._gate.end_prefill(request_id, self._now)
            if placement.decode is None:
                self._end(request_id, call)
            else:
                self._hand_over(request_id, call, placement, seconds)
            self._compute(prefill)

        self._at(self._now + seconds, done)

    def _hand_over(
        self, request_id: int, call: Call, placement: Placement, compute_s: float
    ) -> None:
        assert placement.prefill is not None
        assert placement.decode is not None
        decode = self._decodes[placement.decode]
        row = list(self._prefills).index(placement.prefill)
        column = list(self._decodes).index(placement.decode)
        lacking = call.need.prompt_tokens - decode.cache.tokens(call.arrival.blocks)
        rate = self._cluster.bytes_per_s[row][column]
        transfer_s = max(0, lacking) * self._cluster.token_bytes / rate

        def arrived() -> None:
            decode.joining.append((request_id, call))
            decode.cache.remember(call.arrival.blocks)
            self._step(decode)

        self._at(self._now + max(1e-4, transfer_s - compute_s), arrived)

    # ---- decode

    def _step(self, decode: _Decode) -> None:
        if decode.busy:
            return
        for request_id, call in decode.joining:
            last = decode.steps + call.arrival.output_tokens - 1
            heapq.heappush(decode.ends, (last, request_id, call))
            decode.tokens += call.need.prompt_tokens
        decode.joining.clear()
        sequences = len(decode.ends)
        if not sequences:
            return
        decode.busy = True
        speed, held = decode.speed, decode.tokens
        seconds = self._about(speed.base_s + sequences * speed.sequence_s + held * speed.token_s)

        def done() -> None:
            decode.busy = False
            decode.steps += 1
            decode.tokens += sequences
            decode.fit.observe(sequences, held, seconds)
            while decode.ends and decode.ends[0][0] <= decode.steps:
                _, request_id, call = heapq.heappop(decode.ends)
                decode.tokens -= call.need.prompt_tokens + call.arrival.output_tokens - 1
                self._gate.release(request_id, self._now)
                self._end(request_id, call)
            self._step(decode)

        self._at(self._now + seconds, done)

    def _end(self, request_id: int, call: Call) -> None:
        self._gate.release(request_id, self._now)
        call.ended_at = self._now
        self._open -= 1

    def _about(self, seconds: float) -> float:
        return seconds * self._rng.uniform(0.95, 1.05)
