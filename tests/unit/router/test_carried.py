"""A decode instance drains: its sequences go on elsewhere with their KV, or where they are."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from twinpool.v1 import worker_pb2

from service.errors import DeadlineExceeded, Refused, Unavailable
from tests.unit.router.fakes import FakeDecode, FakePrefill
from tests.unit.router.system import System, collect, error_of, running, until
from tests.unit.router.test_moves import (
    PROMPT,
    drain,
    moved,
    stepping,
    tokens_of,
    two_decodes,
)

TOKENS = 300


@asynccontextmanager
async def leaving(
    **settings: float,
) -> AsyncIterator[tuple[System, FakePrefill, FakeDecode, FakeDecode, Any]]:
    """A request that steps at the first of two decode instances once that one drains."""
    async with two_decodes(**settings) as (system, prefill, first, second):
        first.silent_after, first.pause_after = None, 5
        fields = {"timeout": None} if settings else {}
        call = await stepping(system, first, TOKENS, **fields)
        yield system, prefill, first, second, call
        await system.settled()


def carries(system: System, outcome: str) -> float | None:
    name = "twinpool_router_carries_total"
    return system.sample(name, {"outcome": outcome})


def whole(decode: FakeDecode) -> list[int]:
    """The answer, without its first token."""
    return (decode.answer * TOKENS)[1:TOKENS]


async def test_sequence_goes_on_with_its_kv_and_without_prefill() -> None:
    async with leaving() as (system, prefill, first, second, call):
        [request_id] = first.held
        await drain(system, first)
        messages = await collect(call)
        assert tokens_of(messages) == whole(first)
        assert len(prefill.starts) == 1
        [reserve] = second.reserves.values()
        before = first.reserves[request_id]
        given = list(reserve.output_token_ids)
        assert given == (first.answer * TOKENS)[:4]
        assert reserve.prompt_tokens == len(PROMPT) + len(given)
        assert (reserve.sampling, reserve.stop) == (before.sampling, before.stop)
        assert (reserve.prefill_instance, reserve.prefill_epoch) == (first.name, first.epoch)
        assert second.first_token == (first.answer * TOKENS)[len(given)]
        stats = messages[-1].stats
        assert (stats.moves, stats.retries, stats.decode_instance) == (1, 0, second.name)
        assert stats.pause_s > 0
        assert (moved(system, "drained", "kv"), moved(system, "drained")) == (1, 0)
        assert carries(system, "carried") == 1
        assert system.sample("twinpool_router_carried_bytes_total") == 8192
        assert system.sample("twinpool_router_move_pause_seconds_count", {"way": "kv"})


async def test_only_ranks_that_have_the_sequence_are_named_as_its_source() -> None:
    async with two_decodes() as (system, _, first, second):
        first.silent_after, first.pause_after = None, 5
        first.paused_ranks = [0]
        call = await stepping(system, first, TOKENS)
        await drain(system, first)
        await collect(call)
        [reserve] = second.reserves.values()
        assert [shard.rank for shard in reserve.prefill_layout.shards] == [0]
        await system.settled()


async def test_tokens_tell_of_the_kv_where_its_sender_does_not() -> None:
    async with leaving() as (system, prefill, first, _, call):
        first.is_mute = True
        await drain(system, first)
        assert tokens_of(await collect(call)) == whole(first)
        assert (len(prefill.starts), carries(system, "carried")) == (1, 1)
        await system.settled()
        assert list(first.reserves) == first.aborted


@pytest.mark.parametrize("why", ["no room", "drains too"])
async def test_sequence_stays_where_the_other_instance_does_not_take_it(why: str) -> None:
    async with leaving() as (system, prefill, first, second, call):
        if why == "no room":
            error: Any = Refused("KV_BLOCKS_FULL", needed=9, free=1, retry_after_s=1.0)
        else:
            error = Unavailable("drains", reason="DRAINING")
        second.reserve_errors = [error] * 9
        await drain(system, first)
        assert tokens_of(await collect(call)) == whole(first)
        assert len(prefill.starts) == 1
        assert 1 <= len(second.reserves) <= 3
        assert (carries(system, "stayed"), carries(system, "carried")) == (len(second.reserves), 0)
        assert not first.sends


async def test_sequence_stays_where_its_kv_cannot_be_sent() -> None:
    async with leaving() as (system, prefill, first, second, call):
        first.send_failure = worker_pb2.TransferLost(reason="PeerLost", retryable=True)
        await drain(system, first)
        messages = await collect(call)
        assert tokens_of(messages) == whole(first)
        assert (len(prefill.starts), messages[-1].stats.moves) == (1, 0)
        assert second.aborted == list(second.reserves)


@pytest.mark.parametrize("stage", ["reserve", "send"])
async def test_sequence_stays_where_the_other_instance_dies(stage: str) -> None:
    async with leaving() as (system, prefill, first, second, call):
        gate = second.reserve_gate if stage == "reserve" else first.send_gate
        gate.clear()
        await drain(system, first)
        await until(lambda: bool(second.reserves if stage == "reserve" else first.sends))
        await second.die()
        first.send_failure = worker_pb2.TransferLost(reason="PeerLost", retryable=True)
        gate.set()
        assert tokens_of(await collect(call)) == whole(first)
        assert len(prefill.starts) == 1


@pytest.mark.parametrize("stage", ["reserve", "send"])
async def test_sequence_is_computed_anew_where_its_instance_dies(stage: str) -> None:
    async with leaving() as (system, prefill, first, second, call):
        gate = second.reserve_gate if stage == "reserve" else first.send_gate
        gate.clear()
        await drain(system, first)
        await until(lambda: bool(second.reserves if stage == "reserve" else first.sends))
        await first.die()
        if stage == "send":
            await until(lambda: bool(second.transfers))
            second.lose(next(iter(second.transfers)))
        gate.set()
        messages = await collect(call)
        assert tokens_of(messages) == whole(first)
        assert len(prefill.starts) == 2
        assert (moved(system, "lost") or 0) + (moved(system, "failed") or 0) == 1
        assert messages[-1].stats.moves == 1


async def test_source_that_dies_when_all_is_sent_is_not_missed() -> None:
    async with leaving() as (system, prefill, first, second, call):
        first.send_gate.clear()
        await drain(system, first)
        await until(lambda: bool(first.sends))
        await first.die()
        second.complete(first.sends[0].grant.transfer_id)
        assert tokens_of(await collect(call)) == whole(first)
        assert (len(prefill.starts), carries(system, "carried")) == (1, 1)


async def test_instance_that_dies_after_it_took_over_is_replaced() -> None:
    async with leaving() as (system, prefill, first, second, call):
        second.step_gate.clear()
        await drain(system, first)
        await until(lambda: carries(system, "carried") == 1)
        third = await system.add_decode("c")
        await second.die()
        messages = await collect(call)
        assert tokens_of(messages) == whole(first)
        assert len(prefill.starts) == 2
        assert messages[-1].stats.decode_instance == third.name


async def test_sequence_is_carried_on_from_where_it_was_carried_to() -> None:
    async with leaving() as (system, prefill, first, second, call):
        second.step_gate.clear()
        second.pause_after = 20
        await drain(system, first)
        await until(lambda: carries(system, "carried") == 1)
        third = await system.add_decode("c")
        await drain(system, second)
        messages = await collect(call)
        assert tokens_of(messages) == whole(first)
        assert (len(prefill.starts), messages[-1].stats.moves) == (1, 2)
        assert messages[-1].stats.decode_instance == third.name


@pytest.mark.parametrize("stage", ["reserve", "send"])
async def test_client_that_leaves_in_mid_move_leaves_nothing_behind(stage: str) -> None:
    async with leaving() as (system, _, first, second, call):
        gate = second.reserve_gate if stage == "reserve" else first.send_gate
        gate.clear()
        await drain(system, first)
        await until(lambda: bool(second.reserves if stage == "reserve" else first.sends))
        call.cancel()
        await asyncio.sleep(0.01)
        gate.set()
        await system.settled()
        assert (first.aborted, second.aborted) == (list(first.reserves), list(second.reserves))


@pytest.mark.parametrize("stage", ["reserve", "send"])
async def test_deadline_passes_in_mid_move(stage: str) -> None:
    async with leaving(default_timeout_s=0.5) as (system, _, first, second, call):
        gate = second.reserve_gate if stage == "reserve" else first.send_gate
        gate.clear()
        await drain(system, first)
        assert isinstance(await error_of(call), DeadlineExceeded)
        gate.set()
        await system.settled()
        assert (first.aborted, second.aborted) == (list(first.reserves), list(second.reserves))


@pytest.mark.parametrize("seed", range(3))
async def test_answers_are_whole_whatever_drains_and_dies(seed: int) -> None:
    rng = random.Random(seed)
    async with running(max_retries=8, restart_grace_s=20) as system:
        await system.add_prefill()
        decodes = [await system.add_decode(name) for name in ("d", "e")]
        answer = decodes[0].answer
        wanted = [rng.randrange(2, 300) for _ in range(24)]
        calls = [
            asyncio.ensure_future(collect(system.generate(max_new_tokens=tokens)))
            for tokens in wanted
        ]
        for number in range(6):
            await asyncio.sleep(rng.uniform(0, 0.03))
            victim = decodes.pop(rng.randrange(2))
            await drain(system, victim)
            decodes.append(await system.add_decode(f"d{number}"))
            await asyncio.sleep(rng.uniform(0, 0.03))
            if rng.randrange(2):
                victim = decodes.pop(0)  # that sequences go to
                decodes.append(await system.add_decode(f"e{number}"))
            await victim.hang_up()
        for tokens, call in zip(wanted, calls, strict=True):
            assert tokens_of(await call) == (answer * tokens)[:tokens]
        await system.settled()
