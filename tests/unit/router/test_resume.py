"""A prefill instance is lost in the middle: another one finishes, and the client sees nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.errors import DeadlineExceeded, NotFound, Unavailable, WorkFailed
from tests.unit.router.fakes import FakeDecode, FakePrefill
from tests.unit.router.system import System, collect, error_of, running, text_of, until


@asynccontextmanager
async def two_prefills(
    **settings: float,
) -> AsyncIterator[tuple[System, FakePrefill, FakePrefill, FakeDecode]]:
    """The first of the two is the one that requests go to."""
    async with running(**settings) as system:
        first = await system.add_prefill("a")
        second = await system.add_prefill("b")
        decode = await system.add_decode()
        yield system, first, second, decode


def resumes(system: System, outcome: str) -> float | None:
    labels = {"outcome": outcome}
    return system.sample("twinpool_router_resumes_total", labels)


async def test_death_in_mid_transfer_is_not_seen_by_the_client() -> None:
    async with two_prefills() as (system, first, second, decode):
        first.transfer_gate.clear()
        call = system.generate(max_new_tokens=5)
        began = await call.read()
        await until(lambda: bool(decode.transfers))
        await first.die()
        messages = [began, *await collect(call)]
        assert text_of(messages) == "hello"
        assert [m.token_ids[:] for m in messages[:1]] == [first.answer[:1]]
        stats = messages[-1].stats
        assert (stats.retries, stats.prefill_instance) == (1, "b")
        assert len(second.starts) == len(decode.regrants) == len(decode.reserves) == 1
        assert decode.regrants[0].prefill_instance == "b"
        assert resumes(system, "resumed") == 1
        await system.settled()
        assert decode.aborted == []


async def test_transfer_lost_between_living_instances_goes_elsewhere() -> None:
    async with two_prefills() as (system, first, second, decode):
        first.transfer_gate.clear()
        call = system.generate(max_new_tokens=5)
        await until(lambda: bool(decode.transfers) and bool(first.open))
        decode.lose(1)
        assert text_of(await collect(call)) == "hello"
        assert len(second.starts) == 1
        await system.settled()
        assert first.aborted == list(decode.reserves)


async def test_only_instance_is_taken_again() -> None:
    async with running() as system:
        prefill, decode = await system.add_prefill(), await system.add_decode()
        prefill.transfer_gate.clear()
        call = system.generate(max_new_tokens=5)
        await until(lambda: bool(decode.transfers) and bool(prefill.open))
        decode.lose(1)
        await until(lambda: len(decode.transfers) == 1 and 2 in decode.transfers)
        prefill.transfer_gate.set()
        assert text_of(await collect(call)) == "hello"
        one, two = prefill.starts
        assert one.request_id != two.request_id
        await system.settled()


async def test_news_of_a_transfer_that_was_replaced_changes_nothing() -> None:
    async with two_prefills() as (system, first, second, decode):
        first.transfer_gate.clear()
        second.transfer_gate.clear()
        call = system.generate(max_new_tokens=5)
        await until(lambda: bool(decode.transfers))
        await first.die()
        await until(lambda: 2 in decode.transfers)
        decode.transfers[1] = decode.transfers[2]
        decode.lose(1)
        await asyncio.sleep(0.05)
        second.transfer_gate.set()
        assert text_of(await collect(call)) == "hello"
        assert len(decode.regrants) == 1
        await system.settled()


async def test_loss_told_before_the_grant_is_known_counts() -> None:
    async with two_prefills() as (system, first, second, decode):
        first.transfer_gate.clear()
        decode.reserve_gate.clear()
        call = system.generate(max_new_tokens=5)
        await call.read()
        [request_id] = decode.reserves
        decode.transfers[1] = request_id
        decode.held[request_id] = decode.reserves[request_id].router_id
        decode.lose(1)
        await asyncio.sleep(0.05)
        decode.reserve_gate.set()
        assert text_of(await collect(call)) == "ello"
        assert len(second.starts) == 1
        await system.settled()


async def test_kv_that_had_arrived_is_not_sent_again() -> None:
    async with two_prefills() as (system, first, second, decode):
        first.transfer_gate.clear()
        second.compute_gate.clear()
        decode.regrant_gate.clear()
        decode.step_gate.clear()
        call = system.generate(max_new_tokens=5)
        began = await call.read()
        await until(lambda: bool(decode.transfers))
        await first.die()
        await until(lambda: bool(decode.regrants))
        decode.complete(1)
        decode.regrant_gate.set()
        await until(lambda: not second.open)
        decode.step_gate.set()
        assert text_of([began, *await collect(call)]) == "hello"
        assert resumes(system, "not needed") == 1
        await system.settled()


@pytest.mark.parametrize("losses", [1, 2])
async def test_kv_that_had_arrived_without_a_first_token_still_gets_one(losses: int) -> None:
    async with two_prefills() as (system, first, second, decode):
        third = await system.add_prefill("c")
        first.sends_before_token = True
        second.compute_gate.clear()
        call = asyncio.ensure_future(collect(system.generate(max_new_tokens=5)))
        await until(lambda: any(f.done() for f in decode.completions))
        await first.die()
        await until(lambda: bool(second.open) and bool(decode.regrants))
        if losses == 2:
            await second.die()
            await until(lambda: bool(third.starts))
        second.compute_gate.set()
        messages = await call
        assert text_of(messages) == "hello"
        assert messages[-1].stats.retries == losses
        await system.settled()
        assert decode.aborted == []


async def test_second_loss_goes_to_a_third() -> None:
    async with two_prefills() as (system, first, second, decode):
        first.transfer_gate.clear()
        second.transfer_gate.clear()
        third = await system.add_prefill("c")
        call = system.generate(max_new_tokens=5)
        began = await call.read()
        await until(lambda: bool(decode.transfers))
        await first.die()
        await until(lambda: bool(second.open) and 2 in decode.transfers)
        await second.die()
        messages = [began, *await collect(call)]
        assert text_of(messages) == "hello"
        assert messages[-1].stats.retries == 2
        assert len(third.starts) == 1
        await system.settled()
        assert decode.aborted == []


async def test_loss_while_the_regrant_is_under_way_asks_for_another() -> None:
    async with two_prefills() as (system, first, second, decode):
        first.transfer_gate.clear()
        decode.regrant_gate.clear()
        await system.add_prefill("c")
        call = system.generate(max_new_tokens=5)
        began = await call.read()
        await until(lambda: bool(decode.transfers))
        await first.die()
        await until(lambda: bool(decode.regrants))
        await second.die()
        await until(lambda: len(decode.regrants) == 2)
        decode.regrant_gate.set()
        assert text_of([began, *await collect(call)]) == "hello"
        await system.settled()


async def test_restarted_instance_takes_over() -> None:
    async with running(restart_grace_s=20) as system:
        prefill, decode = await system.add_prefill(), await system.add_decode()
        prefill.transfer_gate.clear()
        call = system.generate(max_new_tokens=5)
        began = await call.read()
        await until(lambda: bool(decode.transfers))
        await prefill.die()
        again = await system.add_prefill()
        assert text_of([began, *await collect(call)]) == "hello"
        assert decode.regrants[0].prefill_epoch == again.epoch
        await system.settled()


async def test_other_first_token_of_the_second_instance_is_not_heard() -> None:
    async with two_prefills() as (system, first, second, decode):
        first.transfer_gate.clear()
        second.answer = second.answer[1:]
        call = system.generate(max_new_tokens=5)
        began = await call.read()
        await until(lambda: bool(decode.transfers))
        await first.die()
        assert text_of([began, *await collect(call)]) == "hello"
        assert decode.first_token == first.answer[0]


async def test_loss_that_no_other_instance_mends_ends_the_request() -> None:
    async with two_prefills() as (system, first, second, decode):
        first.transfer_gate.clear()
        call = system.generate(max_new_tokens=5)
        await call.read()
        await until(lambda: bool(decode.transfers))
        decode.lose(1, retryable=False)
        assert isinstance(await error_of(call), WorkFailed)
        assert not second.starts
        await system.settled()
        assert decode.aborted == list(decode.reserves)


@pytest.mark.parametrize("error", [NotFound("gone"), Unavailable("down", reason="INSTANCE_LOST")])
async def test_decode_that_cannot_resume_takes_the_answer_anew(error: Unavailable) -> None:
    async with two_prefills() as (system, first, second, decode):
        first.transfer_gate.clear()
        decode.regrant_errors = [error]
        call = system.generate(max_new_tokens=5)
        began = await call.read()
        await until(lambda: bool(decode.transfers))
        await first.die()
        assert text_of([began, *await collect(call)]) == "hello"
        assert resumes(system, "failed") == 1
        assert [start.output_tokens for start in second.starts] == [0, 1]
        await system.settled()


@pytest.mark.parametrize("stage", ["queue", "compute", "regrant"])
async def test_client_that_leaves_in_a_resume_leaves_nothing_behind(stage: str) -> None:
    async with two_prefills(restart_grace_s=20) as (system, first, second, decode):
        first.transfer_gate.clear()
        second.compute_gate.clear()
        decode.regrant_gate.clear()
        call = system.generate(max_new_tokens=5)
        await call.read()
        await until(lambda: bool(decode.transfers))
        if stage == "queue":
            await second.die()
        await first.die()
        await until(lambda: system.group.admission.queued == 1 or bool(decode.regrants))
        if stage == "compute":
            decode.regrant_gate.set()
        call.cancel()
        decode.regrant_gate.set()
        await system.settled()
        assert decode.aborted == list(decode.reserves)
        assert system.group.admission.queued == 0


async def test_resume_does_not_wait_behind_those_that_wait_for_its_room() -> None:
    async with running(restart_grace_s=20, max_queue=1, max_bypasses=1) as system:
        prefill = await system.add_prefill()
        decode = await system.add_decode(blocks=16)
        prefill.transfer_gate.clear()
        call = system.generate(max_new_tokens=100)
        began = await call.read()
        await until(lambda: bool(decode.transfers))
        large = asyncio.ensure_future(collect(system.generate(max_new_tokens=240)))
        await until(lambda: system.group.admission.queued == 1)
        await prefill.die()
        await system.add_prefill()
        assert len(text_of([began, *await collect(call)])) == 100
        assert len(text_of(await large)) == 240
        await system.settled()


async def test_deadline_passes_in_a_resume() -> None:
    async with running(restart_grace_s=20, default_timeout_s=0.4) as system:
        prefill, decode = await system.add_prefill(), await system.add_decode()
        prefill.transfer_gate.clear()
        call = system.generate(max_new_tokens=5, timeout=None)
        await call.read()
        await until(lambda: bool(decode.transfers))
        await prefill.die()
        assert isinstance(await error_of(call), DeadlineExceeded)
        await system.settled()
