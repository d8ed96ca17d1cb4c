"""The whole system on a virtual clock: routers, instances, and the ways between them.

Owns where each try of a request is. A transfer begins with its prompt and goes at the slower side's
rate, one at a time through each instance's way out and in; the last of it is there when the prompt
is computed, or later where the way is too slow.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from planner.layout import Role
from planner.simulator.calls import Call
from planner.simulator.clock import Clock
from planner.simulator.decode_instance import DecodeInstance
from planner.simulator.prefill_instance import PrefillInstance
from planner.simulator.router import Router
from planner.simulator.setup import Decodes, Prefills, Setup
from planner.traces import Request
from router.ledger import InstanceKey, Placement
from router.views import Pace
from service.step_fit import StepFit

_HEARTBEAT_S = 1.0


@dataclass(slots=True, kw_only=True)
class _Try:
    """One way of a request through the pools; `began_s` is when prefill began with it."""

    call: Call
    router: Router
    placement: Placement
    began_s: float = 0.0
    has_first: bool = False
    is_decoding: bool = False


class Simulation:
    """Requests through pools, once: make a new one for others."""

    def __init__(self, setup: Setup) -> None:
        self.clock = Clock()
        self._setup = setup
        self._tells_paces = setup.policy == "expected"  # no other one asks for them
        self._prefills = self._made_prefills(setup.prefills)
        self._decodes = self._made_decodes(setup.decodes)
        self._routers = [Router(self.clock, setup, self._send) for _ in range(setup.routers)]
        self._router_of: dict[InstanceKey, Router] = {}
        self._share_out()
        self._ids = itertools.count(1)
        self._tries: dict[int, _Try] = {}
        # Until when an instance's way to others is taken.
        self._way_free_s = dict.fromkeys([*self._prefills, *self._decodes], 0.0)
        self._to_come = 0
        self._busy_prefills = 0

    def run(self, requests: Iterable[Request]) -> list[Call]:
        """Let requests come when they do; return what became of each, in their order."""
        calls = [
            Call(at_s=r.at_s, prompt_tokens=r.prompt_tokens, output_tokens=r.output_tokens)
            for r in requests
        ]
        for loss in self._setup.losses:
            self.clock.at(loss.at_s, partial(self._lose, self._keys(loss.role)[loss.instance]))
        self._to_come = len(calls)
        self._expect(calls)
        if self._tells_paces:
            self._beat()
        self.clock.run()
        for router in self._routers:
            router.check_integrity()
        return calls

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything or holds anything."""
        return not self._tries and all(router.is_idle for router in self._routers)

    # ---- what there is

    def _made_prefills(self, pool: Prefills | None) -> dict[InstanceKey, PrefillInstance]:
        if pool is None:
            return {}
        found = {}
        for number in range(pool.instances):
            key = InstanceKey(f"prefill-{number}", 1)
            found[key] = PrefillInstance(
                self.clock,
                pool,
                block_size=self._setup.prefill_capacity.block_size,
                timeout_s=self._setup.timeout_s,
                on_computed=self._computed,
                slowdown=self._prefill_slowdown,
                on_busy=self._prefill_is_busy,
                fit=StepFit(has_base=False) if self._tells_paces else None,
            )
        return found

    def _made_decodes(self, pool: Decodes) -> dict[InstanceKey, DecodeInstance]:
        return {
            InstanceKey(f"decode-{number}", 1): DecodeInstance(
                self.clock,
                pool,
                on_first=self._first,
                on_end=self._end,
                fit=StepFit() if self._tells_paces else None,
            )
            for number in range(pool.instances)
        }

    def _share_out(self) -> None:
        """Give each router every so-manieth instance of each role."""
        setup, count = self._setup, len(self._routers)
        for number, router in enumerate(self._routers):
            prefills = list(self._prefills)[number::count]
            decodes = list(self._decodes)[number::count]
            self._router_of.update(dict.fromkeys([*prefills, *decodes], router))
            router.add(
                dict.fromkeys(prefills, setup.prefill_capacity),
                dict.fromkeys(decodes, setup.decode_capacity),
            )

    def _keys(self, role: Role) -> list[InstanceKey]:
        return list(self._prefills if role is Role.PREFILL else self._decodes)

    # ---- a request's way

    def _expect(self, calls: Sequence[Call]) -> None:
        """Have the next request come in its time, and the others after it."""
        if self._to_come:
            call = calls[len(calls) - self._to_come]
            self.clock.at(call.at_s, partial(self._come, call, calls))

    def _come(self, call: Call, calls: Sequence[Call]) -> None:
        router = self._routers[self._to_come % len(self._routers)]
        self._to_come -= 1
        self._expect(calls)
        router.come(next(self._ids), call)

    def _send(self, request_id: int, call: Call, placement: Placement) -> None:
        key = placement.prefill or placement.decode
        assert key is not None
        router = self._router_of[key]
        self._tries[request_id] = _Try(call=call, router=router, placement=placement)
        self.clock.after(self._setup.beside.request_s, partial(self._deliver, request_id))

    def _deliver(self, request_id: int) -> None:
        one = self._tries.get(request_id)
        if one is None:
            return
        if one.placement.prefill is not None:
            tokens = one.call.prompt_tokens + one.call.tokens
            self._prefills[one.placement.prefill].add(request_id, tokens)
        else:
            self._decode(request_id, one, is_local=True)

    def _decode(self, request_id: int, one: _Try, *, is_local: bool) -> None:
        assert one.placement.decode is not None
        one.is_decoding = True
        call = one.call
        prompt_tokens = call.prompt_tokens + call.tokens
        self._decodes[one.placement.decode].add(
            request_id,
            prompt_tokens=prompt_tokens,
            output_tokens=call.output_tokens - call.tokens,
            dp_rank=one.placement.dp_rank,
            missing_tokens=prompt_tokens if is_local else 0,
        )

    def _computed(self, request_id: int, began_s: float) -> None:
        """Prefill is done with a prompt."""
        one = self._tries[request_id]
        one.began_s = began_s
        self._first(request_id)
        if one.placement.decode is None:
            self._free_prefill(request_id, one)
            self._end(request_id)
        else:
            arrives_s = self._arrives_s(one) + self._setup.beside.hand_over_s
            self.clock.at(arrives_s, partial(self._arrived, request_id))

    def _first(self, request_id: int) -> None:
        one = self._tries[request_id]
        one.has_first = True
        if not one.call.has_begun:
            one.call.first_at = self.clock.now + self._setup.beside.answer_s
        one.router.end_prefill(request_id)

    def _arrives_s(self, one: _Try) -> float:
        """Return when decode has the KV of a prompt that is computed now."""
        prefill, decode = one.placement.prefill, one.placement.decode
        assert prefill is not None
        assert decode is not None
        begins_s = max(one.began_s, self._way_free_s[prefill], self._way_free_s[decode])
        ends_s = begins_s + self._transfer_s(one.call.prompt_tokens + one.call.tokens)
        self._way_free_s[prefill] = self._way_free_s[decode] = ends_s
        return max(self.clock.now + self._transfer_s(0), ends_s)

    def _transfer_s(self, tokens: int) -> float:
        assert self._setup.prefills is not None
        costs = self._setup.prefills.costs, self._setup.decodes.costs
        return max(each.transfer_s(tokens) for each in costs)

    def _arrived(self, request_id: int) -> None:
        one = self._tries.get(request_id)
        if one is not None:
            self._free_prefill(request_id, one)
            self._decode(request_id, one, is_local=False)

    def _free_prefill(self, request_id: int, one: _Try) -> None:
        prefill = self._prefills.get(one.placement.prefill) if one.placement.prefill else None
        if prefill is not None:
            prefill.free(request_id)

    def _end(self, request_id: int) -> None:
        one = self._tries.pop(request_id)
        one.call.ended_at = self.clock.now + self._setup.beside.answer_s
        one.router.release(request_id)

    # ---- what instances take from each other

    def _prefill_slowdown(self) -> float:
        times = self._setup.shared.prefill
        if times == 1:
            return 1.0
        return times if any(decode.is_busy for decode in self._decodes.values()) else 1.0

    def _prefill_is_busy(self, is_busy: bool) -> None:
        self._busy_prefills += 1 if is_busy else -1
        times = self._setup.shared.decode
        if times != 1 and self._busy_prefills == is_busy:  # the first one, or none any more
            for decode in self._decodes.values():
                decode.slow_down(times if is_busy else 1.0)

    # ---- what instances say, and what becomes of them

    def _beat(self) -> None:
        """Have all instances tell how fast they are, as long as there is something to place."""
        for key, instance in (self._prefills | self._decodes).items():
            self._router_of[key].note_pace(key, Pace(speed=instance.speed))
        if self._to_come or not self.is_idle:
            self.clock.after(_HEARTBEAT_S, self._beat)

    def _lose(self, key: InstanceKey) -> None:
        """Have an instance end; what it had goes on elsewhere, from the tokens that there are."""
        had = [
            (request_id, one, self._tokens_of(request_id, one))
            for request_id, one in self._tries.items()
            if key == one.placement.decode or (key == one.placement.prefill and not one.is_decoding)
        ]
        for instances in (self._prefills, self._decodes):
            if key in instances:
                instances.pop(key).stop()
        self._router_of[key].lose(key)
        for request_id, one, tokens in had:
            del self._tries[request_id]
            self._free_prefill(request_id, one)
            one.router.release(request_id)
            one.call.tokens += tokens
            one.call.moves += 1
            one.router.come(next(self._ids), one.call)

    def _tokens_of(self, request_id: int, one: _Try) -> int:
        """Return the tokens that this try has given, at least one fewer than are wanted."""
        if not one.is_decoding:
            return int(one.has_first)
        assert one.placement.decode is not None
        most = one.call.output_tokens - one.call.tokens - 1
        return min(most, self._decodes[one.placement.decode].tokens_of(request_id))
