"""What a call leaves behind: nothing of ours that only the collector would find.

A router answers and refuses hundreds of calls a second, and everybody waits while it is looked for.
"""

import asyncio
import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import pytest

from service.errors import Refused
from tests.unit.router.system import collect, error_of, pair, until

CALLS = 20
# There is one of each for a call. What earlier tests have left is found as well, and is less.
KINDS = {"Account", "Attempt", "Answer", "PrefillCall", "PrefillLeg", "Progress", "Refused"}


@pytest.fixture
def collector() -> Iterator[None]:
    """Python's, at rest, and keeping what it finds."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


async def found_after(call: Callable[[], Awaitable[object]]) -> Counter[str]:
    """How many of each kind calls leave in cycles; not those that some calls only have left."""
    await call()
    gc.collect()
    gc.garbage.clear()
    for _ in range(CALLS):
        await call()
    await asyncio.sleep(0.05)  # until what ends a call has ended itself
    gc.collect()
    found = Counter(type(each).__name__ for each in gc.garbage)
    return Counter({kind: found[kind] for kind in KINDS if found[kind] >= CALLS})


@pytest.mark.usefixtures("collector")
async def test_answered_request_leaves_nothing_in_cycles() -> None:
    async with pair() as (system, _, _):

        async def answered() -> None:
            await collect(system.generate(max_new_tokens=5))
            await system.settled()

        assert not await found_after(answered)


@pytest.mark.usefixtures("collector")
async def test_refused_request_leaves_nothing_in_cycles() -> None:
    async with pair(max_queue=1) as (system, _, decode):
        decode.step_gate.clear()
        holder = system.generate(max_new_tokens=1000)
        await until(lambda: bool(decode.reserves))
        waiting = system.generate(max_new_tokens=1000)
        await until(lambda: system.group.admission.queued == 1)

        async def refused() -> None:
            assert isinstance(await error_of(system.generate(max_new_tokens=5)), Refused)

        assert not await found_after(refused)
        holder.cancel()
        waiting.cancel()
