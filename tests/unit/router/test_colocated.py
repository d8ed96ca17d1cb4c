"""Requests at instances that compute prompts and decode, without any prefill pool."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from twinpool.v1 import worker_pb2

from router.fairness import Tenants
from router.gate import Gate
from router.ledger import Ledger
from router.policies import POLICIES, PolicyName
from router.queue import Waiting
from router.views import AskEach, Capacity, InstanceKey, Need, Pace, Placement
from service.errors import Refused, Unavailable
from service.step_fit import StepSpeed
from tests.unit.router.served import TOKENIZER
from tests.unit.router.system import System, collect, error_of, running, text_of, until

A, B = (InstanceKey(name, 1) for name in "ab")
CAPACITY = Capacity(
    blocks=100,
    block_size=16,
    max_sequences=8,
    max_sequence_tokens=1600,
    local_prefill_tokens=64,
    colocated=True,
)
ANSWER = "hello world"
LENGTH = len(TOKENIZER.encode(ANSWER))
OPTIONS = {"local_prefill_tokens": 32, "colocated": True}


class Pool:
    """A gate over colocated instances."""

    def __init__(self, *keys: InstanceKey, policy: PolicyName = "least-loaded") -> None:
        self.ledger = Ledger(max_prefill_requests=4)
        self.gate = Gate(
            ledger=self.ledger,
            policy=POLICIES[policy](),
            tenants=Tenants(),
            max_queue=8,
            max_bypasses=8,
            grace_s=1.0,
            refuses_early=False,
        )
        for key in keys:
            self.ledger.add_decode(key, CAPACITY)
        self.gate.instances_changed(0.0)
        self._next_id = 0

    def place(
        self,
        prompt: int,
        new: int = 8,
        *,
        now: float = 0.0,
        known: Callable[[InstanceKey], int] = lambda _: 0,
    ) -> Placement | None:
        self._next_id += 1
        waiting = Waiting(
            request_id=self._next_id,
            need=Need(prompt_tokens=prompt, max_new_tokens=new),
            priority=0,
            start_by=100.0,
            cached_tokens=AskEach(lambda key, _: known(key)),
        )
        self.gate.offer(waiting, now)
        decisions = self.gate.decide(now)
        self.ledger.check_integrity()
        return next((found for _, found in decisions if isinstance(found, Placement)), None)


@pytest.mark.parametrize("new", [1, 2, 8])
def test_request_of_any_length_is_one_instances_alone(new: int) -> None:
    pool = Pool(A)
    assert pool.place(600, new) == Placement(prefill=None, decode=A)
    assert pool.ledger.held(A) == ([-(-(600 + new) // 16)], 1)
    pool.gate.end_prefill(1, 1.0)
    pool.gate.release(1, 2.0)
    assert pool.ledger.is_idle()


@pytest.mark.parametrize("policy", POLICIES)
def test_replicas_get_requests_by_any_policy(policy: PolicyName) -> None:
    pool = Pool(A, B, policy=policy)
    for key in (A, B):
        speed = StepSpeed(base_s=0.01, sequence_s=0.001, token_s=0.0)
        pool.ledger.set_pace(key, Pace(speed=speed))
    placed = [pool.place(100, new) for new in (1, 8, 8, 8)]
    assert [found.decode for found in placed if found is not None] in ([A, B, A, B], [A, B, B, A])


def test_replica_that_knows_the_prompt_is_taken_until_it_is_fuller_by_as_much() -> None:
    pool = Pool(A, B)
    found = [pool.place(160, known=lambda key: 160 if key == B else 0) for _ in range(3)]
    assert found[0] == Placement(prefill=None, decode=B, cached_tokens=159)
    assert [each.decode for each in found if each is not None] == [B, A, B]


def test_request_waits_for_room_and_then_has_it() -> None:
    pool = Pool(A)
    assert pool.place(1500, 8) is not None
    assert pool.place(300, 1) is None
    pool.gate.release(1, 1.0)
    [(_, found)] = pool.gate.decide(1.0)
    assert found == Placement(prefill=None, decode=A)


def test_what_no_instance_can_hold_is_refused() -> None:
    with pytest.raises(Refused, match="it can never fit") as refused:
        Pool(A).place(1600, 1)
    assert (refused.value.needed, refused.value.free) == (1601, 1600)
    assert Pool(A).place(1599, 1) is not None


def test_instances_that_start_again_are_waited_for_and_no_prefill_is_missed() -> None:
    pool = Pool(A)
    pool.ledger.remove(A)
    pool.gate.instances_changed(1.0)
    assert pool.place(100, 1, now=1.5) is None
    [(_, error)] = pool.gate.decide(2.5)
    assert "no decode instance" in str(error)
    with pytest.raises(Unavailable, match="no decode instance"):
        pool.place(100, now=2.5)
    pool.ledger.add_decode(B, CAPACITY)
    pool.gate.instances_changed(3.0)
    assert pool.place(100, now=3.0) == Placement(prefill=None, decode=B)


def test_request_that_waited_for_other_pools_goes_to_one_instance() -> None:
    pool = Pool()
    apart = replace(CAPACITY, colocated=False)
    pool.ledger.add_prefill(A, apart)
    pool.ledger.add_decode(B, apart)
    pool.gate.instances_changed(0.0)
    for _ in range(4):
        assert pool.place(100, 1) is not None
    assert pool.place(100, 1) is None
    for key in (A, B):
        pool.ledger.remove(key)
    pool.ledger.add_decode(A, CAPACITY)
    pool.gate.instances_changed(0.5)
    [(_, found)] = pool.gate.decide(0.5)
    assert found == Placement(prefill=None, decode=A)


# ---- the router around it


async def ask(system: System, **options: Any) -> list[str]:
    """The answer, and where it came from."""
    messages = await collect(system.generate(max_new_tokens=LENGTH, **options))
    stats = messages[-1].stats
    assert (stats.prefill_instance, stats.kv_bytes) == ("", 0)
    return [text_of(messages), stats.decode_instance]


async def test_router_serves_without_any_prefill_instance() -> None:
    async with running() as system:
        decode = await system.add_decode("a", **OPTIONS)
        assert await ask(system) == [ANSWER, "a"]
        assert await ask(system, prompt="word " * 60) == [ANSWER, "a"]
        messages = await collect(system.generate(max_new_tokens=1))
        assert len(messages[-1].token_ids) == 1
        await system.settled()
        assert decode.aborted == []
        status = await system.membership.GetStatus(worker_pb2.GetStatusRequest())
        assert [instance.capacity.colocated for instance in status.instances] == [True]


async def test_sequence_of_a_lost_replica_goes_on_at_another_from_its_last_token() -> None:
    async with running() as system:
        first = await system.add_decode("a", silent_after=3, **OPTIONS)
        call = system.generate(max_new_tokens=LENGTH)
        tokens: list[int] = []
        while len(tokens) < 3:
            tokens += (await call.read()).token_ids
        second = await system.add_decode("b", **OPTIONS)
        await first.die()
        messages = await collect(call)
        [moved] = second.reserves.values()
        assert (moved.local_prefill, list(moved.output_token_ids)) == (True, tokens)
        everything = tokens + [t for message in messages for t in message.token_ids]
        assert everything == TOKENIZER.encode(ANSWER)
        await system.settled()


async def test_sequence_goes_on_at_the_same_replica_once_it_is_back() -> None:
    async with running(restart_grace_s=5.0) as system:
        first = await system.add_decode("a", silent_after=3, **OPTIONS)
        call = system.generate(max_new_tokens=LENGTH)
        tokens: list[int] = []
        while len(tokens) < 3:
            tokens += (await call.read()).token_ids
        await first.die()
        await system.add_decode("a", **OPTIONS)
        messages = await collect(call)
        everything = tokens + [t for message in messages for t in message.token_ids]
        assert everything == TOKENIZER.encode(ANSWER)
        await system.settled()


async def test_lost_replica_is_named_as_what_is_missing() -> None:
    async with running() as system:
        decode = await system.add_decode("a", **OPTIONS)
        await decode.die()
        await until(lambda: not system.group.ledger.decodes())
        error = await error_of(system.generate(max_new_tokens=LENGTH))
        assert error.reason == "NO_INSTANCE"
        assert "no decode instance" in error.message
