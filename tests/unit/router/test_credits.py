"""A router that shares decode with others books from its credit, and says what it makes of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from twinpool.v1 import worker_pb2

from service.errors import InvalidRequest
from tests.unit.router.fakes import FakeDecode
from tests.unit.router.system import System, collect, error_of, running, until

BLOCKS = 64
BLOCK = 16
# Of the prompt that a request of these tests has, with what it may generate.
NEW_TOKENS = 40


class Shared:
    """A decode instance that gives credits by hand, and what the router answered."""

    def __init__(self, system: System, decode: FakeDecode, call: Any) -> None:
        self.system = system
        self.decode = decode
        self.call = call
        self.uses: list[worker_pb2.CreditUse] = []
        self._serial = 0

    async def give(self, blocks: int, sequences: int = 8, **flags: bool) -> None:
        """Gives a credit; returns when the router has answered it."""
        self._serial += 1
        credit = worker_pb2.Credit(
            serial=self._serial, blocks=[blocks], sequences=sequences, **flags
        )
        await self.call.write(worker_pb2.RegisterRequest(credit=credit))
        await until(lambda: any(use.serial == self._serial for use in self.uses))

    async def listen(self) -> None:
        while (response := await self.call.read()) is not None:
            if response.WhichOneof("kind") == "credit_use":
                self.uses.append(response.credit_use)

    @property
    def held(self) -> int:
        """Blocks that the router has booked."""
        key = self.system.group.ledger.decodes()[0].key
        return self.system.group.ledger.reserved_blocks(key)


@asynccontextmanager
async def shared() -> AsyncIterator[Shared]:
    async with running(heartbeat_interval_s=10) as system:
        await system.add_prefill()
        decode = FakeDecode("decode", blocks=BLOCKS)
        decode.step_gate.clear()
        await decode.start()
        system.instances.append(decode)
        call = system.membership.Register()
        hello = decode.hello()
        hello.credits = True
        await call.write(worker_pb2.RegisterRequest(hello=hello))
        accepted: Any = await call.read()
        assert accepted.accepted.credits
        found = Shared(system, decode, call)
        listening = asyncio.create_task(found.listen())
        await until(lambda: bool(system.group.ledger.decodes()))
        try:
            yield found
        finally:
            decode.step_gate.set()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            call.cancel()


def ask(it: Shared, new_tokens: int = NEW_TOKENS) -> "asyncio.Task[Any]":
    call = it.system.generate(max_new_tokens=new_tokens, ignore_eos=True)
    return asyncio.create_task(collect(call))


async def queued(it: Shared, count: int) -> None:
    await until(lambda: it.system.group.admission.queued == count)


async def test_nothing_is_booked_before_the_first_credit() -> None:
    async with shared() as it:
        answer = ask(it)
        await queued(it, 1)
        await it.give(BLOCKS)
        await until(lambda: it.held > 0)
        it.decode.step_gate.set()
        await answer


async def test_request_larger_than_the_credit_waits_and_asks_for_more() -> None:
    async with shared() as it:
        await it.give(1, shared=True)
        answer = ask(it)
        await queued(it, 1)
        await until(lambda: it.uses[-1].wanted[0] > 1)
        use = it.uses[-1]
        # There is nowhere else to make room for it.
        assert use.wanted == use.largest
        assert (list(use.held), use.sequences_held, use.sequences_wanted) == ([0], 0, 1)
        await it.give(use.wanted[0], shared=True)
        await until(lambda: it.uses[-1].held == use.wanted)
        assert list(it.uses[-1].largest) == [0]
        it.decode.step_gate.set()
        await answer


async def test_smaller_credit_takes_nothing_away_and_lets_nothing_in_until_it_is_made_up() -> None:
    async with shared() as it:
        await it.give(BLOCKS, shared=True)
        first = ask(it)
        await until(lambda: it.held > 0)
        held = it.held
        await it.give(held - 1, shared=True)
        assert list(it.uses[-1].held) == [held]
        second = ask(it)
        await queued(it, 1)
        await it.give(2 * held - 1, shared=True)
        assert it.system.group.admission.queued == 1
        await it.give(2 * held, shared=True)
        await queued(it, 0)
        it.system.group.ledger.check_integrity()
        it.decode.step_gate.set()
        await asyncio.gather(first, second)


async def test_places_for_sequences_are_shared_as_well() -> None:
    async with shared() as it:
        await it.give(BLOCKS, sequences=1, shared=True)
        answers = [ask(it), ask(it)]
        await queued(it, 1)
        await until(lambda: it.uses[-1].sequences_wanted == 2)
        await it.give(BLOCKS, sequences=2, shared=True)
        await queued(it, 0)
        it.decode.step_gate.set()
        await asyncio.gather(*answers)


async def test_what_comes_back_is_told_at_once_where_others_wait_for_it() -> None:
    async with shared() as it:
        await it.give(BLOCKS, shared=True, scarce=True)
        answer = ask(it)
        await until(lambda: it.uses[-1].held[0] > 0)
        it.decode.step_gate.set()
        await answer
        await until(lambda: it.uses[-1].held[0] == 0)


async def test_router_alone_has_nothing_to_tell() -> None:
    async with shared() as it:
        await it.give(BLOCKS)
        it.decode.step_gate.set()
        await ask(it)
        told = len(it.uses)
        await it.give(BLOCKS)
        assert len(it.uses) == told + 1


async def test_status_tells_the_credit() -> None:
    async with shared() as it:
        await it.give(7, sequences=3)
        status = await it.system.membership.GetStatus(worker_pb2.GetStatusRequest(), timeout=10)
        [found] = [i for i in status.instances if i.name == "decode"]
        assert (found.credit_blocks, found.credit_sequences) == (7, 3)
        [other] = [i for i in status.instances if i.name == "prefill"]
        assert other.credit_blocks == other.capacity.blocks


@pytest.mark.parametrize(
    "credit",
    [
        worker_pb2.Credit(serial=1, blocks=[BLOCKS + 1], sequences=1),
        worker_pb2.Credit(serial=1, blocks=[1, 1], sequences=1),
        worker_pb2.Credit(serial=1, blocks=[], sequences=1),
        worker_pb2.Credit(serial=1, blocks=[1], sequences=1000),
    ],
)
async def test_credit_for_what_the_instance_has_not_is_refused(credit: worker_pb2.Credit) -> None:
    async with running() as system:
        decode = FakeDecode("decode", blocks=BLOCKS)
        await decode.start()
        system.instances.append(decode)
        call = system.membership.Register()
        hello = decode.hello()
        hello.credits = True
        await call.write(worker_pb2.RegisterRequest(hello=hello))
        await call.write(worker_pb2.RegisterRequest(credit=credit))
        assert isinstance(await error_of(call), InvalidRequest)
