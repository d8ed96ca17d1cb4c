"""What happens to requests, clients and the ledger when something breaks or goes away."""

import asyncio

import grpc
import pytest
from twinpool.v1 import worker_pb2

from router.workers import worker_error
from service.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Refused,
    Unavailable,
    WorkFailed,
)
from tests.unit.router.served import model
from tests.unit.router.system import collect, error_of, pair, running, text_of, until
from tests.unit.router.test_membership import instance

FULL = Refused("NO_BLOCKS", needed=2, free=0, retry_after_s=0.05)


async def test_closed_stream_frees_everything_everywhere() -> None:
    async with pair() as (system, _, decode):
        decode.step_gate.clear()
        call = system.generate(max_new_tokens=500)
        await call.read()
        await until(lambda: bool(decode.held))
        call.cancel()
        await system.settled()
        assert decode.aborted == list(decode.reserves)


async def test_stream_closed_during_prefill_aborts_both_pools() -> None:
    async with pair() as (system, prefill, decode):
        prefill.compute_gate.clear()
        call = system.generate(max_new_tokens=500)
        await until(lambda: bool(decode.held) and bool(prefill.open))
        call.cancel()
        await system.settled()
        assert prefill.aborted == decode.aborted == list(decode.reserves)


async def test_reservation_under_way_at_the_abort_is_undone_after_it() -> None:
    async with pair() as (system, prefill, decode):
        prefill.compute_gate.clear()
        decode.reserve_gate.clear()
        call = system.generate(max_new_tokens=500)
        await until(lambda: bool(decode.reserves) and bool(prefill.open))
        call.cancel()
        await until(lambda: bool(prefill.aborted))
        assert not decode.aborted
        decode.reserve_gate.set()
        await system.settled()
        assert decode.aborted == list(decode.reserves)


async def test_stream_closed_in_the_queue_leaves_no_trace() -> None:
    async with pair() as (system, _, decode):
        decode.step_gate.clear()
        holder = system.generate(max_new_tokens=1000)
        await until(lambda: bool(decode.reserves))
        call = system.generate(max_new_tokens=1000)
        await until(lambda: system.group.admission.queued == 1)
        call.cancel()
        await until(lambda: system.group.admission.queued == 0)
        holder.cancel()
        await system.settled()
        assert len(decode.reserves) == 1


async def test_prefill_death_before_the_first_token_is_made_good_elsewhere() -> None:
    async with running() as system:
        first = await system.add_prefill("first")
        decode = await system.add_decode()
        first.compute_gate.clear()
        call = asyncio.ensure_future(collect(system.generate(max_new_tokens=5, temperature=1)))
        await until(lambda: bool(first.starts))
        second = await system.add_prefill("second")
        await first.die()
        messages = await call
        assert text_of(messages) == "hello"
        assert messages[-1].stats.retries == 1
        assert messages[-1].stats.prefill_instance == "second"
        assert first.starts[0].sampling == second.starts[0].sampling
        # Each instance gets an id of its own, and the client sees that of the first.
        [held] = decode.reserves
        assert first.starts[0].request_id == held
        assert second.starts[0].request_id == held ^ 1
        assert messages[0].request_id == f"{held:016x}"
        await system.settled()
        assert decode.aborted == []


async def test_prefill_restart_takes_the_request_again() -> None:
    async with pair(restart_grace_s=20) as (system, prefill, _):
        prefill.compute_gate.clear()
        call = asyncio.ensure_future(collect(system.generate(max_new_tokens=5)))
        await until(lambda: bool(prefill.starts))
        await prefill.die()
        await system.add_prefill()
        messages = await call
        assert messages[-1].stats.retries == 1
        await system.settled()


@pytest.mark.parametrize("granted", [False, True])
async def test_dying_prefill_whose_registration_still_lives_costs_one_retry(granted: bool) -> None:
    async with pair(restart_grace_s=20) as (system, prefill, decode):
        if not granted:
            decode.reserve_gate.clear()
        prefill.compute_gate.clear()
        call = asyncio.ensure_future(collect(system.generate(max_new_tokens=5)))
        await until(lambda: bool(prefill.starts) and bool(decode.held) == granted)
        await prefill.hang_up()
        await asyncio.sleep(0.3)  # longer than all retries would take
        decode.reserve_gate.set()
        await prefill.die()
        await system.add_prefill()
        messages = await call
        assert messages[-1].stats.retries == 1
        await system.settled()


async def test_decode_death_before_the_first_token_is_made_good_elsewhere() -> None:
    async with pair() as (system, prefill, decode):
        prefill.compute_gate.clear()
        call = asyncio.ensure_future(collect(system.generate(max_new_tokens=5)))
        await until(lambda: bool(decode.held))
        await decode.die()
        await system.add_decode("other")
        prefill.compute_gate.set()
        messages = await call
        assert messages[-1].stats.decode_instance == "other"
        assert messages[-1].stats.retries == 1
        await system.settled()


async def test_decode_death_that_nobody_makes_good_is_unavailable_and_frees_the_ledger() -> None:
    async with pair(max_queue_wait_s=0.2) as (system, _, decode):
        decode.step_gate.clear()
        calls = [system.generate(max_new_tokens=50) for _ in range(3)]
        for call in calls:
            await call.read()
        await decode.die()
        for call in calls:
            error = await error_of(call)
            assert isinstance(error, Unavailable)
            assert error.reason == "INSTANCE_LOST"
        await until(system.group.ledger.is_idle)
        system.group.ledger.check_integrity()


async def test_prefill_death_that_nobody_makes_good_is_unavailable() -> None:
    async with pair(max_queue_wait_s=0.2) as (system, prefill, decode):
        prefill.transfer_gate.clear()
        call = system.generate(max_new_tokens=50)
        await call.read()
        await until(lambda: bool(decode.held))
        await prefill.die()
        error = await error_of(call)
        assert isinstance(error, Unavailable)
        await system.settled()
        assert decode.aborted == list(decode.reserves)


async def test_prefill_death_after_the_kv_has_arrived_is_no_matter() -> None:
    async with pair() as (system, prefill, decode):
        prefill.transfer_gate.clear()
        call = system.generate(max_new_tokens=5)
        first = await call.read()
        await until(lambda: bool(decode.held))
        await prefill.die()
        decode.complete(next(iter(decode.transfers)))
        assert text_of([first, *await collect(call)]) == "hello"
        await system.settled()


async def test_failed_transfer_after_the_first_token_is_unavailable() -> None:
    async with pair() as (system, prefill, _):
        prefill.fail_transfer = True
        error = await error_of(system.generate(max_new_tokens=5))
        assert isinstance(error, Unavailable)
        assert error.reason == "PeerLost"
        await system.settled()


async def test_decode_failure_in_mid_answer_ends_the_stream() -> None:
    async with pair() as (system, _, decode):
        failure = worker_pb2.SequenceFailure(reason="OutOfBlocks", message="no", retryable=True)
        decode.fail_after = (3, failure)
        error = await error_of(system.generate(max_new_tokens=50))
        assert isinstance(error, Unavailable)
        assert error.reason == "OutOfBlocks"
        await system.settled()
        assert decode.aborted == list(decode.reserves)


async def test_failure_that_no_retry_mends_is_not_retried() -> None:
    async with pair() as (system, prefill, _):
        prefill.errors = [WorkFailed("not a number", reason="BadLogits", retryable=False)]
        error = await error_of(system.generate(max_new_tokens=1))
        assert isinstance(error, WorkFailed)
        assert len(prefill.starts) == 1
        await system.settled()


@pytest.mark.parametrize("failures", [2, 3])
async def test_retries_are_bounded(failures: int) -> None:
    async with pair(max_retries=2) as (system, prefill, _):
        prefill.errors = [
            WorkFailed("lost", reason="PeerLost", retryable=True) for _ in range(failures)
        ]
        call = system.generate(max_new_tokens=5)
        if failures <= 2:
            assert (await collect(call))[-1].stats.retries == 2
        else:
            assert isinstance(await error_of(call), Unavailable)
        await system.settled()


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (grpc.StatusCode.UNKNOWN, "Stream removed"),
        (grpc.StatusCode.INTERNAL, "Internal error from Core"),
        (grpc.StatusCode.UNAVAILABLE, "Connection reset by peer"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"),
        (grpc.StatusCode.FAILED_PRECONDITION, "no Run stream"),
    ],
)
def test_status_of_a_broken_stream_allows_another_try(code: grpc.StatusCode, details: str) -> None:
    empty = grpc.aio.Metadata()
    raised = grpc.aio.AioRpcError(code, empty, empty, details, None)
    error = worker_error(instance(), raised)
    assert isinstance(error, Unavailable)
    assert "'decode'" in error.message


async def test_full_prefill_is_tried_again() -> None:
    async with pair() as (system, prefill, _):
        prefill.errors = [Refused("PREFILL_QUEUE_FULL", needed=1, free=0, retry_after_s=0.1)]
        messages = await collect(system.generate(max_new_tokens=5))
        assert messages[-1].stats.retries == 1


async def test_defect_of_an_instance_reaches_the_client_as_such() -> None:
    async with pair() as (system, prefill, _):
        # One token, so that no grant is on its way: it could hide the stream's status.
        prefill.errors = [Internal("internal error")]
        assert isinstance(await error_of(system.generate(max_new_tokens=1)), Internal)
        prefill.errors = [InvalidRequest("stop", "x", "y")]
        assert isinstance(await error_of(system.generate(max_new_tokens=1)), InvalidRequest)
        await system.settled()


async def test_decode_that_lacks_room_for_a_moment_is_asked_again() -> None:
    async with pair() as (system, _, decode):
        decode.reserve_errors = [FULL, FULL]
        messages = await collect(system.generate(max_new_tokens=5))
        assert text_of(messages) == "hello"
        assert messages[-1].stats.retries == 0
        await system.settled()


async def test_deadline_during_decode_releases_everything() -> None:
    async with pair(default_timeout_s=0.3) as (system, _, decode):
        decode.step_gate.clear()
        error = await error_of(system.generate(max_new_tokens=50, timeout=None))
        assert isinstance(error, DeadlineExceeded)
        await system.settled()
        assert decode.aborted == list(decode.reserves)


async def test_clients_own_deadline_releases_everything() -> None:
    async with pair() as (system, _, decode):
        decode.step_gate.clear()
        error = await error_of(system.generate(max_new_tokens=50, timeout=0.3))
        assert isinstance(error, DeadlineExceeded)
        await system.settled()
        assert decode.aborted == list(decode.reserves)


async def test_pools_are_told_the_time_that_is_left() -> None:
    async with pair() as (system, prefill, decode):
        await collect(system.generate(max_new_tokens=2, timeout=8.0))
        [reserve] = decode.reserves.values()
        assert 0 < prefill.starts[0].ttl_ms <= 9000
        assert 0 < reserve.ttl_ms <= 9000


async def test_many_requests_under_aborts_leave_nothing_behind() -> None:
    async with pair() as (system, _, _):
        calls = [system.generate(max_new_tokens=2 + n % 40) for n in range(60)]
        for call in calls[::3]:
            await asyncio.sleep(0.001)
            call.cancel()
        answers = [await collect(c) for n, c in enumerate(calls) if n % 3]
        assert len(answers) == 40
        await system.settled()
        assert system.group.ledger.decodes()[0].free_blocks == 64


async def test_client_that_does_not_read_holds_nothing_beyond_the_deadline() -> None:
    async with running(default_timeout_s=0.5, max_new_tokens=1 << 20) as system:
        wide = model(max_model_len=1 << 20)
        await system.add_prefill(model_description=wide)
        decode = await system.add_decode(model_description=wide, blocks=1 << 14)
        decode.tokens_per_step = 2000
        # More than the stream's buffers take while nobody reads.
        decode.silent_after = 100_000
        call = system.generate(max_new_tokens=200_000, logprobs=1, timeout=None)
        await call.read()
        await system.settled()
        assert decode.aborted == list(decode.reserves)
        assert isinstance(await error_of(call), DeadlineExceeded)
