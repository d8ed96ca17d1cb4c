"""Requests that get no place: what they are told, and in which order the others wait."""

import asyncio
from typing import Any

import pytest
from twinpool.v1 import inference_pb2

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
        await until(lambda: system.router.admission.queued == 1)
        error = await error_of(system.generate(max_new_tokens=1000))
        assert isinstance(error, Refused)
        assert error.retryable
        assert error.reason == "QUEUE_FULL"
        waiting.cancel()
        await until(lambda: system.router.admission.queued == 0)
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


async def test_deadline_ends_a_wait_in_the_queue() -> None:
    async with pair(default_timeout_s=0.2) as (system, _, decode):
        decode.step_gate.clear()
        holder = system.generate(max_new_tokens=1000)
        await until(lambda: bool(decode.reserves))
        error = await error_of(system.generate(max_new_tokens=1000, timeout=None))
        assert isinstance(error, DeadlineExceeded)
        assert system.router.admission.queued == 0
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
            await until(lambda count=number + 1: system.router.admission.queued == count)  # type: ignore[misc]
        decode.step_gate.set()
        await collect(holder)
        await asyncio.gather(*calls)
        assert [start.priority for start in prefill.starts] == [0, 3, 0, -1]
        await system.settled()


async def test_requests_wait_for_a_pool_that_is_being_restarted() -> None:
    async with pair(restart_grace_s=20) as (system, _, decode):
        await decode.die()
        await until(lambda: not system.router.ledger.decodes())
        call = asyncio.ensure_future(collect(system.generate(max_new_tokens=3)))
        await until(lambda: system.router.admission.queued == 1)
        await system.add_decode()
        assert text_of(await call) == "hel"
        await system.settled()


async def test_requests_fail_where_the_pool_does_not_come_back() -> None:
    async with pair(restart_grace_s=0.3) as (system, _, decode):
        await decode.die()
        await until(lambda: not system.router.ledger.decodes())
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
        ({"model": "other"}, "model"),
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
        await until(lambda: system.router.admission.queued == 2)
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
        await until(lambda: system.router.metrics.outcomes["aborted"] == 1)
        counts = (await _status(system)).requests
    assert (counts.finished, counts.refused, counts.aborted, counts.failed) == (1, 1, 1, 0)
    assert (counts.queued, counts.running) == (0, 0)


async def _status(system: System) -> Any:
    from twinpool.v1 import worker_pb2

    return await system.membership.GetStatus(worker_pb2.GetStatusRequest())
