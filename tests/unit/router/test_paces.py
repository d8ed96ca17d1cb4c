"""What instances report of their speed, and what requests ask for, as placement gets to see it."""

import asyncio
from collections.abc import Sequence
from math import inf, nan

import pytest
from twinpool.v1 import inference_pb2, worker_pb2

from router.config import RouterConfig
from router.hello import heartbeat_from_wire, instance_from_wire
from router.ledger import Capacity, InstanceKey, Ledger, Need
from router.policies.least_loaded import LeastLoaded
from router.queue import Waiting
from router.request import GenerateInput, StopInput
from router.room import Misfits, Room
from router.validate import ModelLimits, check
from router.views import CachedTokens, DecodeView, Link, Placement, PrefillView
from router.wire import input_from_wire
from service.step_fit import StepSpeed
from tests.unit.router.fakes import FakePrefill
from tests.unit.router.system import running, until

SPEED = worker_pb2.StepSpeed(base_s=0.5, sequence_s=0.25, token_s=0.125)


def test_speed_is_read_as_it_was_reported() -> None:
    beat = heartbeat_from_wire(worker_pb2.Heartbeat(speed=SPEED))
    assert beat.speed == StepSpeed(base_s=0.5, sequence_s=0.25, token_s=0.125)
    assert heartbeat_from_wire(worker_pb2.Heartbeat()).speed is None


@pytest.mark.parametrize("seconds", [-1.0, inf, nan, 0.0])
def test_speed_that_nobody_can_have_is_not_believed(seconds: float) -> None:
    speed = worker_pb2.StepSpeed(token_s=seconds)
    assert heartbeat_from_wire(worker_pb2.Heartbeat(speed=speed)).speed is None


def test_slowest_way_to_an_instance_counts_for_each_of_its_ranks() -> None:
    pairs = [
        worker_pb2.KvPair(peer=peer, rank=rank, bytes_per_s=rate, rtt_s=rtt)
        for peer, rank, rate, rtt in (("x", 0, 2e9, 0.1), ("x", 1, 1e9, 0.2), ("y", 0, 0.0, 0.0))
    ]
    pace = heartbeat_from_wire(worker_pb2.Heartbeat(pairs=pairs)).pace
    assert pace.links == {"x": Link(2e9, 0.2), "y": Link(0.0, 0.0)}


async def test_bytes_of_a_token_follow_from_the_layout() -> None:
    hello = FakePrefill("a", lambda _: None).hello()  # type: ignore[arg-type,return-value]
    hello.address = "127.0.0.1:1"
    shape = hello.layout.shape
    one = shape.layers * shape.kv_heads * shape.head_size * 4
    assert instance_from_wire(hello).capacity.token_bytes == 2 * one
    shape.planes = 1
    assert instance_from_wire(hello).capacity.token_bytes == one


async def test_what_heartbeats_report_comes_to_be_placed_by() -> None:
    async with running() as system:
        prefill = FakePrefill("a", system.decode_named)
        await prefill.start()
        call = system.membership.Register()
        await call.write(worker_pb2.RegisterRequest(hello=prefill.hello()))

        async def beat() -> None:
            message = worker_pb2.Heartbeat(speed=SPEED)
            while True:
                await call.write(worker_pb2.RegisterRequest(heartbeat=message))
                await asyncio.sleep(0.01)

        beats = asyncio.create_task(beat())
        await until(lambda: any(v.pace.speed for v in system.group.ledger.prefills()))
        found = await system.membership.GetStatus(worker_pb2.GetStatusRequest())
        assert found.instances[0].speed == SPEED
        beats.cancel()
        await asyncio.wait({beats})
        call.cancel()
        await prefill.die()


def test_limits_of_a_request_are_in_seconds_and_may_be_left_out() -> None:
    slo = inference_pb2.Slo(ttft_ms=250)
    given = input_from_wire(inference_pb2.GenerateRequest(slo=slo))
    assert (given.ttft_s, given.tpot_s) == (0.25, inf)


def test_limits_outlive_the_checks_and_the_first_one_the_first_token_does_not() -> None:
    given = GenerateInput(prompt=None, stop=StopInput(max_new_tokens=5), ttft_s=0.25, tpot_s=0.5)
    limits = ModelLimits(
        vocab_size=10,
        max_model_len=100,
        known_roles=None,
        largest_prompt=None,
        largest_request=None,
    )
    request = check(given, (1, 2), limits, RouterConfig().caps)
    assert (request.need.ttft_s, request.need.tpot_s) == (0.25, 0.5)
    need = request.after([3]).need
    assert (need.ttft_s, need.tpot_s) == (inf, 0.5)


class Asked:
    """A policy that remembers what was asked of it."""

    def __init__(self) -> None:
        self.needs: list[Need] = []

    def choose(
        self,
        prefills: Sequence[PrefillView],
        decodes: Sequence[DecodeView],
        need: Need,
        cached_tokens: CachedTokens,
    ) -> Placement | None:
        self.needs.append(need)
        return LeastLoaded().choose(prefills, decodes, need, cached_tokens)


@pytest.mark.parametrize(("now", "left_s"), [(10.0, 2.0), (11.5, 0.5), (99.0, 0.001)])
def test_wait_in_the_queue_is_taken_off_the_time_to_the_first_token(
    now: float, left_s: float
) -> None:
    ledger, policy = Ledger(max_prefill_requests=4), Asked()
    capacity = Capacity(blocks=8, block_size=16, max_sequences=4, max_sequence_tokens=64)
    ledger.add_prefill(InstanceKey("a", 1), capacity)
    need = Need(prompt_tokens=4, max_new_tokens=1, ttft_s=2.0)
    waiting = Waiting(request_id=1, need=need, priority=0, start_by=inf)
    waiting.came_at, waiting.is_queued = 10.0, True
    assert Room(ledger, policy, Misfits(), now).place(waiting) is not None
    assert policy.needs[0].ttft_s == pytest.approx(left_s)
