"""Requests that get no place: what they are told, and in which order the others wait."""

import asyncio
from typing import Any

import pytest
from twinpool.v1 import inference_pb2

from router.forecast import MIN_ENDS
from service.errors import DeadlineExceeded, InvalidRequest, Refused, Unavailable
from tests.unit.router.system import System, collect, error_of, pair, running, text_of, until


async def test_request_that_can_never_fit_is_refused_without_a_retry_time() -> None:
    async with pair() as (system, _, _):
        error = await error_of(system.generate(max_new_tokens=2000))
    assert isinstance(error, Refused)
    assert not error.retryable
    assert error.reason == "NEVER_FITS"
    assert (error.needed, error.free) == (2000 + len("say hello"), 64 * 16)


async def test_full_queue_refuses_with_a_retry_time() -> None:
    async with pair(max_queue=1) as (system, _, decode):
        decode.step_gate.clear()
        running_call = system.generate(max_new_tokens=1000)
        await until(lambda: bool(decode.reserves))
        waiting = system.generate(max_new_tokens=1000)
        await until(lambda: system.group.admission.queued == 1)
        error = await error_of(system.generate(max_new_tokens=1000))
        assert isinstance(error, Refused)
        assert error.retryable
        assert error.reason == "QUEUE_FULL"
        assert error.needed == 1000
        # Its prompt is not even looked at.
        error = await error_of(system.generate(""))
        assert error.reason == "QUEUE_FULL"
        assert admissions(system, "refused", "QUEUE_FULL") == 2
        waiting.cancel()
        await until(lambda: system.group.admission.queued == 0)
        running_call.cancel()
        await system.settled()


async def test_wait_beyond_the_limit_is_refused_with_a_retry_time() -> None:
    async with pair(max_queue_wait_s=0.1) as (system, _, decode):
        decode.step_gate.clear()
        holder = system.generate(max_new_tokens=1000)
        await until(lambda: bool(decode.reserves))
        error = await error_of(system.generate(max_new_tokens=1000))
        assert isinstance(error, Refused)
        assert error.reason == "QUEUE_WAIT"
        assert error.retryable
        holder.cancel()
        await system.settled()


async def test_tenant_above_its_cap_is_refused_while_others_are_let_in() -> None:
    async with pair(max_tenant_requests={"*": 1, "vip": 2}) as (system, _, decode):
        decode.step_gate.clear()
        held = [system.generate(max_new_tokens=9, tenant=t) for t in ("a", "vip", "vip")]
        await until(lambda: len(decode.reserves) == 3)
        error = await error_of(system.generate(max_new_tokens=9, tenant="a"))
        assert isinstance(error, Refused)
        assert (error.reason, error.needed, error.free) == ("TENANT_CAP", 1, 0)
        assert error.retryable
        decode.step_gate.set()
        for call in held:
            await collect(call)
        await system.settled()
        assert admissions(system, "admitted", "") == 3
        assert admissions(system, "refused", "TENANT_CAP") == 1


async def test_tenant_that_fills_the_queue_gives_way_in_it() -> None:
    async with pair(max_queue=2) as (system, _, decode):
        decode.step_gate.clear()
        holder = system.generate(max_new_tokens=1000, tenant="flood")
        await until(lambda: bool(decode.reserves))
        first = system.generate(max_new_tokens=1000, tenant="flood", timeout=20)
        await until(lambda: system.group.admission.queued == 1)
        last = system.generate(max_new_tokens=1000, tenant="flood", timeout=30)
        await until(lambda: system.group.admission.queued == 2)
        other = asyncio.ensure_future(collect(system.generate(max_new_tokens=3, tenant="b")))
        error = await error_of(last)
        assert isinstance(error, Refused)
        assert (error.reason, error.retryable) == ("QUEUE_FULL", True)
        assert not first.done()
        decode.step_gate.set()
        assert text_of(await other) == "hel"
        await collect(holder)
        await collect(first)
        await system.settled()


async def test_wait_that_is_known_to_be_of_no_use_is_refused_at_once() -> None:
    async with pair(max_queue_wait_s=0.001) as (system, _, decode):
        for _ in range(MIN_ENDS):
            await collect(system.generate(max_new_tokens=100, ignore_eos=True))
        decode.step_gate.clear()
        holder = system.generate(max_new_tokens=1000)
        await until(lambda: len(decode.reserves) > MIN_ENDS)
        error = await error_of(system.generate(max_new_tokens=1000))
        assert isinstance(error, Refused)
        assert error.reason == "PREDICTED_WAIT"
        assert error.retryable
        assert system.group.admission.queued == 0
        holder.cancel()
        await system.settled()
        assert admissions(system, "refused", "PREDICTED_WAIT") == 1


async def test_whoever_is_told_to_wait_in_vain_may_be_let_wait() -> None:
    async with pair(max_queue_wait_s=0.001, refuse_early=False) as (system, _, decode):
        for _ in range(MIN_ENDS):
            await collect(system.generate(max_new_tokens=100, ignore_eos=True))
        decode.step_gate.clear()
        holder = system.generate(max_new_tokens=1000)
        await until(lambda: len(decode.reserves) > MIN_ENDS)
        error = await error_of(system.generate(max_new_tokens=1000))
        assert error.reason == "QUEUE_WAIT"
        holder.cancel()
        await system.settled()


async def test_waits_are_measured_by_class_of_priority_and_against_the_forecast() -> None:
    async with pair() as (system, _, _):
        for priority in (-7, 0, 0, 3, 9):
            await collect(system.generate(max_new_tokens=2, priority=priority))
        for _ in range(MIN_ENDS):
            await collect(system.generate(max_new_tokens=2))
        read = system.sample
        name = "twinpool_router_queue_seconds_count"
        counts = [read(name, {"priority": p}) for p in ("low", "normal", "high")]
        assert counts == [1, 2 + MIN_ENDS, 2]
        foretold = read("twinpool_router_foretold_queue_seconds_count")
        assert foretold == read("twinpool_router_foretold_error_seconds_count") == 5


def admissions(system: System, outcome: str, reason: str) -> float | None:
    labels = {"outcome": outcome, "reason": reason}
    return system.sample("twinpool_router_admissions_total", labels)


async def test_deadline_ends_a_wait_in_the_queue() -> None:
    async with pair(default_timeout_s=0.2) as (system, _, decode):
        decode.step_gate.clear()
        holder = system.generate(max_new_tokens=1000)
        await until(lambda: bool(decode.reserves))
        error = await error_of(system.generate(max_new_tokens=1000, timeout=None))
        assert isinstance(error, DeadlineExceeded)
        assert system.group.admission.queued == 0
        holder.cancel()
        await system.settled()


async def test_higher_priority_leaves_the_queue_first() -> None:
    async with pair() as (system, prefill, decode):
        decode.step_gate.clear()
        holder = system.generate(max_new_tokens=1000)
        await until(lambda: bool(decode.reserves))
        calls = []
        for number, (prompt, priority) in enumerate([("low", -1), ("mid", 0), ("high", 3)]):
            call = system.generate(prompt, max_new_tokens=1000, priority=priority)
            calls.append(asyncio.ensure_future(collect(call)))
            await until(lambda count=number + 1: system.group.admission.queued == count)  # type: ignore[misc]
        decode.step_gate.set()
        await collect(holder)
        await asyncio.gather(*calls)
        assert [start.priority for start in prefill.starts] == [0, 3, 0, -1]
        await system.settled()


async def test_requests_wait_for_a_pool_that_is_being_restarted() -> None:
    async with pair(restart_grace_s=20) as (system, _, decode):
        await decode.die()
        await until(lambda: not system.group.ledger.decodes())
        call = asyncio.ensure_future(collect(system.generate(max_new_tokens=3)))
        await until(lambda: system.group.admission.queued == 1)
        await system.add_decode()
        assert text_of(await call) == "hel"
        await system.settled()


async def test_requests_fail_where_the_pool_does_not_come_back() -> None:
    async with pair(restart_grace_s=0.3) as (system, _, decode):
        await decode.die()
        await until(lambda: not system.group.ledger.decodes())
        queued = await error_of(system.generate(max_new_tokens=3))
        later = await error_of(system.generate(max_new_tokens=3))
        for error in (queued, later):
            assert isinstance(error, Unavailable)
            assert error.reason == "NO_INSTANCE"
            assert "no decode instance" in error.message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ""}, "prompt.text"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"max_new_tokens": 0}, "stop.max_new_tokens"),
        ({"stop": [""]}, "stop.stop[0]"),
    ],
)
async def test_invalid_values_are_named(fields: dict[str, Any], field: str) -> None:
    async with pair() as (system, prefill, _):
        error = await error_of(system.generate(**fields))
        assert isinstance(error, InvalidRequest)
        assert error.field == field
        assert not prefill.starts


async def test_count_tokens_checks_its_prompt() -> None:
    async with pair() as (system, _, _):
        request = inference_pb2.CountTokensRequest(prompt=inference_pb2.Prompt(text=""))
        error = await error_of(system.inference.CountTokens(request))
        assert isinstance(error, InvalidRequest)


async def test_sequences_limit_of_decode_is_kept() -> None:
    async with running() as system:
        await system.add_prefill()
        decode = await system.add_decode(max_sequences=2)
        decode.step_gate.clear()
        calls = [asyncio.ensure_future(collect(system.generate(max_new_tokens=3))) for _ in "abcd"]
        await until(lambda: system.group.admission.queued == 2)
        assert len(decode.reserves) <= 2
        decode.step_gate.set()
        assert [text_of(answer) for answer in await asyncio.gather(*calls)] == ["hel"] * 4
        await system.settled()


async def test_status_counts_what_happened() -> None:
    async with pair() as (system, _, decode):
        await collect(system.generate(max_new_tokens=2))
        await error_of(system.generate(max_new_tokens=2000))
        decode.step_gate.clear()
        call = system.generate(max_new_tokens=100)
        await call.read()
        status = await _status(system)
        assert status.requests.running == 1
        reserved = {i.name: i.ledger_reserved for i in status.instances}
        assert reserved == {"prefill": 0, "decode": 7}
        call.cancel()
        await system.settled()
        await until(lambda: system.group.metrics.requests.outcomes["aborted"] == 1)
        counts = (await _status(system)).requests
    assert (counts.finished, counts.refused, counts.aborted, counts.failed) == (1, 1, 1, 0)
    assert (counts.queued, counts.running) == (0, 0)


async def _status(system: System) -> Any:
    from twinpool.v1 import worker_pb2

    return await system.membership.GetStatus(worker_pb2.GetStatusRequest())
