"""A decode instance is lost in the middle: the answer goes on elsewhere as if nothing had been."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from twinpool.v1 import inference_pb2, worker_pb2

from service.errors import DeadlineExceeded, Unavailable, WorkFailed
from tests.unit.router.fakes import FakeDecode, FakePrefill
from tests.unit.router.served import TOKENIZER
from tests.unit.router.system import System, collect, error_of, running, text_of, until

PROMPT = TOKENIZER.encode("say hello")
ANSWER = "hello world"


@asynccontextmanager
async def two_decodes(
    **settings: float,
) -> AsyncIterator[tuple[System, FakePrefill, FakeDecode, FakeDecode]]:
    """The first of the two is the one that requests go to; it falls silent after three tokens."""
    async with running(**settings) as system:
        prefill = await system.add_prefill()
        first = await system.add_decode("a", blocks=65, silent_after=3)
        second = await system.add_decode("b")
        yield system, prefill, first, second


def moved(system: System, reason: str, way: str = "prefill") -> float | None:
    labels = {"reason": reason, "way": way}
    return system.sample("twinpool_router_moved_requests_total", labels)


async def read_tokens(call: Any, count: int) -> list[inference_pb2.GenerateResponse]:
    """Reads until there are so many tokens."""
    messages: list[inference_pb2.GenerateResponse] = []
    while sum(len(m.token_ids) for m in messages) < count:
        messages.append(await call.read())
    return messages


def tokens_of(messages: list[inference_pb2.GenerateResponse]) -> list[int]:
    return [token for message in messages for token in message.token_ids]


def handed_back(reason: str = "DRAINED") -> worker_pb2.SequenceFailure:
    return worker_pb2.SequenceFailure(reason=reason, message="the instance stops", retryable=True)


async def test_death_in_mid_answer_is_not_seen_by_the_client() -> None:
    async with two_decodes() as (system, _, first, _second):
        call = system.generate(max_new_tokens=11, logprobs=1, temperature=0.5)
        began = await read_tokens(call, 3)
        await first.die()
        messages = [*began, *await collect(call)]
        assert text_of(messages) == ANSWER
        assert tokens_of(messages) == first.answer
        assert [p.chosen.token_id for m in messages for p in m.logprobs] == first.answer
        usage, stats = messages[-1].usage, messages[-1].stats
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), 11)
        assert (stats.moves, stats.retries, stats.decode_instance) == (1, 0, "b")
        assert stats.pause_s > 0
        assert stats.prefill_s == 0.25  # the prompt's, not that of what was computed anew
        assert moved(system, "lost") == 1
        await system.settled()


async def test_instances_are_told_what_was_generated() -> None:
    async with two_decodes() as (system, prefill, first, second):
        call = system.generate(
            max_new_tokens=11, min_new_tokens=7, temperature=1, repetition_penalty=1.5
        )
        await read_tokens(call, 3)
        await first.die()
        await collect(call)
        before, after = prefill.starts
        assert after.output_tokens == 3
        assert list(after.prompt_token_ids) == PROMPT + first.answer[:3]
        assert (after.sampling, after.stop) == (before.sampling, before.stop)
        assert before.sampling.HasField("seed")
        [reserve] = second.reserves.values()
        assert reserve.prompt_tokens == len(PROMPT) + 3
        assert list(reserve.prompt_token_ids) == PROMPT
        assert list(reserve.output_token_ids) == first.answer[:3]
        assert (reserve.sampling, reserve.stop) == (before.sampling, before.stop)


async def test_room_is_booked_for_what_the_request_needed_from_the_start() -> None:
    async with two_decodes() as (system, _, first, second):
        second.step_gate.clear()
        call = system.generate(max_new_tokens=100)
        await read_tokens(call, 3)
        blocks = system.group.ledger.reserved_blocks(_key(first))
        await first.die()
        await until(lambda: bool(second.held))
        assert system.group.ledger.reserved_blocks(_key(second)) == blocks
        call.cancel()
        await system.settled()


def _key(instance: FakeDecode) -> Any:
    return (instance.name, instance.epoch)


async def test_stop_string_is_found_across_a_move() -> None:
    async with two_decodes() as (system, _, first, _second):
        first.silent_after = 5
        call = system.generate(max_new_tokens=50, stop=["o wo"])
        began = await read_tokens(call, 5)
        assert text_of(began) == "hell"  # the start of what may be a stop string is held back
        await first.die()
        messages = [*began, *await collect(call)]
        assert text_of(messages) == "hell"
        assert tokens_of(messages) == first.answer[:8]
        await system.settled()


async def test_last_token_that_was_lost_comes_from_prefill_alone() -> None:
    async with two_decodes() as (system, prefill, first, second):
        call = system.generate(max_new_tokens=4)
        began = await read_tokens(call, 3)
        await first.die()
        messages = [*began, *await collect(call)]
        assert text_of(messages) == "hell"
        assert not prefill.starts[1].transfer
        assert not second.reserves
        assert messages[-1].stats.decode_instance == "a"
        await system.settled()


async def test_answer_moves_as_often_as_it_grows() -> None:
    async with running(max_retries=1) as system:
        prefill = await system.add_prefill()
        call = None
        began: list[inference_pb2.GenerateResponse] = []
        for round_ in range(6):
            most = 3 + 2 * round_
            decode = await system.add_decode(f"d{round_}", silent_after=most)
            call = call or system.generate(max_new_tokens=40)
            began += await read_tokens(call, most - len(tokens_of(began)))
            await decode.die()
        last = await system.add_decode("last")
        assert call is not None
        messages = [*began, *await collect(call)]
        assert tokens_of(messages) == (last.answer * 4)[:40]
        assert (messages[-1].stats.moves, messages[-1].stats.retries) == (6, 0)
        ids = [start.request_id for start in prefill.starts]
        assert len(set(ids)) == 7
        assert len({request_id >> 12 for request_id in ids}) == 1
        await system.settled()


async def test_tries_without_a_token_from_decode_are_bounded() -> None:
    async with two_decodes(max_retries=2) as (system, prefill, first, second):
        first.silent_after = None
        first.fail_after = second.fail_after = (3, handed_back("PeerLost"))
        call = system.generate(max_new_tokens=11)
        error = await error_of(call)
        assert isinstance(error, Unavailable)
        assert error.reason == "PeerLost"
        # Tokens that prefill gave are kept, but are no sign that decode will do any better.
        assert [start.output_tokens for start in prefill.starts] == [0, 3, 4, 5]
        await system.settled()


async def test_answer_waits_for_an_instance_to_come_back() -> None:
    async with two_decodes(restart_grace_s=0.05) as (system, _, first, second):
        call = system.generate(max_new_tokens=11)
        began = await read_tokens(call, 3)
        await second.die()
        await first.die()
        await asyncio.sleep(0.2)  # longer than new requests wait
        assert isinstance(await error_of(system.generate(max_new_tokens=11)), Unavailable)
        await system.add_decode("a")
        messages = [*began, *await collect(call)]
        assert text_of(messages) == ANSWER
        assert messages[-1].stats.pause_s >= 0.2
        await system.settled()


async def test_answer_goes_on_before_new_requests_and_past_a_full_queue() -> None:
    async with two_decodes(max_queue=1, restart_grace_s=20) as (system, _, first, second):
        call = system.generate(max_new_tokens=800)
        began = await read_tokens(call, 3)
        await second.die()
        await first.die()
        await until(lambda: system.group.admission.queued == 1)
        later = asyncio.ensure_future(collect(system.generate(max_new_tokens=800)))
        await until(lambda: system.group.admission.queued == 2)
        again = await system.add_decode("a")
        messages = [*began, *await collect(call)]
        assert len(tokens_of(messages)) == 800
        await later
        # It has its room first, though the pool has room for one only.
        assert [r.output_token_ids[:] for r in again.reserves.values()] == [first.answer[:3], []]
        await system.settled()


async def test_pause_is_bounded_by_the_wait_for_room() -> None:
    async with two_decodes(max_queue_wait_s=0.2) as (system, _, first, second):
        call = system.generate(max_new_tokens=11)
        await read_tokens(call, 3)
        await second.die()
        await first.die()
        error = await error_of(call)
        assert isinstance(error, Unavailable)
        assert error.reason == "INSTANCE_LOST"
        await system.settled()


async def test_failure_that_no_move_mends_ends_the_answer() -> None:
    async with two_decodes() as (system, prefill, first, _):
        failure = worker_pb2.SequenceFailure(reason="BadLogits", message="no", retryable=False)
        first.silent_after, first.fail_after = None, (3, failure)
        assert isinstance(await error_of(system.generate(max_new_tokens=11)), WorkFailed)
        assert len(prefill.starts) == 1
        await system.settled()


async def test_sequence_that_is_handed_back_goes_on_elsewhere() -> None:
    async with two_decodes() as (system, _, first, second):
        first.silent_after, first.fail_after = None, (3, handed_back())
        messages = await collect(system.generate(max_new_tokens=11))
        assert text_of(messages) == ANSWER
        assert moved(system, "drained") == 1
        # The heartbeat that tells of the drain may be a while in coming.
        assert text_of(await collect(system.generate(max_new_tokens=11))) == ANSWER
        assert (len(first.reserves), len(second.reserves)) == (1, 2)
        await system.settled()


@pytest.mark.parametrize("why", ["few tokens to go", "no room elsewhere"])
async def test_answer_stays_at_a_draining_instance(why: str) -> None:
    async with two_decodes() as (system, _, first, second):
        first.silent_after = None
        few = why == "few tokens to go"
        call = await stepping(system, first, 30 if few else 500)
        if not few:
            second.step_gate.clear()
            other = system.generate(max_new_tokens=1000)
            await until(lambda: bool(second.held))
        await drain(system, first)
        assert len(tokens_of(await collect(call))) == (29 if few else 499)
        assert not first.aborted
        if not few:
            other.cancel()
        await system.settled()


async def stepping(system: System, decode: FakeDecode, tokens: int, **fields: Any) -> Any:
    """A request that has its first token, at an instance that waits for its gate."""
    decode.step_gate.clear()
    call = system.generate(max_new_tokens=tokens, **fields)
    await call.read()
    await until(lambda: bool(decode.held))
    return call


async def drain(system: System, decode: FakeDecode) -> None:
    await system.membership.Drain(worker_pb2.DrainRequest(instance=decode.name))
    decode.step_gate.set()


@pytest.mark.parametrize("stage", ["queue", "compute", "reserve", "transfer"])
async def test_client_that_leaves_in_a_move_leaves_nothing_behind(stage: str) -> None:
    async with two_decodes() as (system, prefill, first, second):
        call = system.generate(max_new_tokens=11)
        await read_tokens(call, 3)
        await until(lambda: not prefill.open)
        prefill.compute_gate.clear()
        if stage == "reserve":
            second.reserve_gate.clear()
        if stage == "transfer":
            prefill.compute_gate.set()
            prefill.transfer_gate.clear()
        if stage == "queue":
            await second.die()
        await first.die()
        if stage == "queue":
            await until(lambda: system.group.admission.queued == 1)
        else:
            await until(lambda: bool(prefill.open) and bool(second.reserves))
        call.cancel()
        second.reserve_gate.set()
        await until(lambda: system.group.admission.queued == 0)
        await system.settled()
        assert second.aborted == list(second.reserves)


@pytest.mark.parametrize("stage", ["queue", "compute"])
async def test_deadline_passes_in_a_move(stage: str) -> None:
    async with two_decodes(default_timeout_s=0.5) as (system, prefill, first, second):
        call = system.generate(max_new_tokens=11, timeout=None)
        await read_tokens(call, 3)
        prefill.compute_gate.clear()
        if stage == "queue":
            await second.die()
        await first.die()
        assert isinstance(await error_of(call), DeadlineExceeded)
        await system.settled()
        assert second.aborted == list(second.reserves)


async def test_prefill_that_is_lost_in_a_move_is_replaced_too() -> None:
    async with two_decodes() as (system, prefill, first, second):
        call = system.generate(max_new_tokens=11)
        began = await read_tokens(call, 3)
        await until(lambda: not prefill.open)
        other = await system.add_prefill("z")
        prefill.transfer_gate.clear()
        await first.die()
        await until(lambda: bool(second.transfers) and bool(prefill.open))
        await prefill.die()
        messages = [*began, *await collect(call)]
        assert text_of(messages) == ANSWER
        assert other.starts[-1].output_tokens == 3
        assert (messages[-1].stats.moves, messages[-1].stats.retries) == (1, 1)
        await system.settled()


@pytest.mark.parametrize("seed", range(3))
async def test_answers_are_whole_whatever_dies_at_whatever_moment(seed: int) -> None:
    rng = random.Random(seed)
    async with running(max_retries=8, restart_grace_s=20) as system:
        prefills = [await system.add_prefill(name) for name in ("p", "q")]
        decodes = [await system.add_decode(name) for name in ("d", "e")]
        answer = decodes[0].answer
        wanted = [rng.randrange(2, 300) for _ in range(24)]
        calls = [
            asyncio.ensure_future(collect(system.generate(max_new_tokens=tokens)))
            for tokens in wanted
        ]
        for number in range(6):
            await asyncio.sleep(rng.uniform(0, 0.03))
            if number == 3:
                await prefills.pop().die()
                prefills.append(await system.add_prefill("q"))
                continue
            victim = decodes.pop(rng.randrange(2))
            await rng.choice([victim.die, victim.hang_up])()
            decodes.append(await system.add_decode(f"d{number}"))
        for tokens, call in zip(wanted, calls, strict=True):
            assert tokens_of(await call) == (answer * tokens)[:tokens]
        await system.settled()
