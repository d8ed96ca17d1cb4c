"""Tries whose prompts decode computes: no prefill instance hears of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from twinpool.v1 import worker_pb2

from tests.unit.router.fakes import STOP, FakeDecode
from tests.unit.router.served import TOKENIZER
from tests.unit.router.system import System, collect, running, text_of, until

ANSWER = "hello world"
LENGTH = len(TOKENIZER.encode(ANSWER))


@asynccontextmanager
async def alone(**options: object) -> AsyncIterator[tuple[System, FakeDecode]]:
    """A router with a decode instance that computes prompts, and nothing else."""
    async with running(local_prefill_max=64) as system:
        decode = await system.add_decode("a", local_prefill_tokens=32, **options)
        yield system, decode


async def test_answer_begins_and_ends_at_decode() -> None:
    async with alone() as (system, decode):
        decode.cached_tokens = 4
        messages = await collect(system.generate(max_new_tokens=LENGTH))
        assert text_of(messages) == ANSWER
        stats = messages[-1].stats
        assert (stats.prefill_instance, stats.decode_instance) == ("", "a")
        assert (stats.prefill_s, stats.cached_tokens, stats.decode_cached_tokens) == (0.25, 4, 4)
        assert stats.kv_bytes == 0
        await system.settled()
        assert decode.aborted == []


async def test_first_token_may_come_before_the_room_is_confirmed() -> None:
    async with alone() as (system, decode):
        decode.reserve_gate.clear()
        call = system.generate(max_new_tokens=LENGTH)
        assert (await call.read()).token_ids
        decode.reserve_gate.set()
        await collect(call)
        await system.settled()


async def test_client_that_leaves_in_mid_prompt_is_forgotten_everywhere() -> None:
    async with alone() as (system, decode):
        decode.prompt_gate.clear()
        call = system.generate(max_new_tokens=LENGTH)
        await until(lambda: bool(decode.held))
        call.cancel()
        await system.settled()
        assert decode.aborted == list(decode.reserves)
        [view] = system.group.ledger.decodes()
        assert system.group.admission.local.owed(view.key) == 0


@pytest.mark.parametrize("reason", ["DRAINED", "PREEMPTED", "PeerLost"])
async def test_prompt_that_is_handed_back_is_computed_anew(reason: str) -> None:
    async with alone() as (system, decode):
        decode.fail_prompt = worker_pb2.SequenceFailure(reason=reason, retryable=True)
        decode.prompt_gate.clear()
        call = system.generate(max_new_tokens=LENGTH)
        await until(lambda: bool(decode.held))
        await system.add_decode("b", local_prefill_tokens=32)
        decode.prompt_gate.set()
        await until(lambda: not decode.held)
        decode.fail_prompt = None
        assert text_of(await collect(call)) == ANSWER
        await system.settled()


async def test_decode_lost_in_mid_prompt_costs_a_retry_and_later_a_move() -> None:
    async with alone() as (system, decode):
        decode.prompt_gate.clear()
        call = system.generate(max_new_tokens=LENGTH)
        await until(lambda: bool(decode.held))
        second = await system.add_decode("b", local_prefill_tokens=32)
        second.silent_after = 3
        await decode.die()
        tokens: list[int] = []
        while len(tokens) < 3:
            tokens += (await call.read()).token_ids
        third = await system.add_decode("c", local_prefill_tokens=32)
        await second.die()
        messages = await collect(call)
        stats = messages[-1].stats
        assert (stats.retries, stats.moves, stats.decode_instance) == (1, 1, "c")
        [moved] = third.reserves.values()
        assert list(moved.output_token_ids) == tokens
        everything = tokens + [t for message in messages for t in message.token_ids]
        assert everything == TOKENIZER.encode(ANSWER)
        await system.settled()


async def test_first_token_that_ends_the_answer_leaves_nothing_to_abort() -> None:
    async with alone() as (system, decode):
        decode.stops_at_once = True
        messages = await collect(system.generate(max_new_tokens=LENGTH))
        assert [message.finish_reason for message in messages] == [STOP]
        await system.settled()
        assert decode.aborted == []
