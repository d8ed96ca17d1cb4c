"""Requests that are sent when they are due, and the times that are measured of them."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from bench.goodputs.backend import Backend, SendError
from bench.goodputs.load import LOST_IN_ROW, OpenLoop, ServerLost, check
from bench.goodputs.openai_backend import OpenAIBackend
from bench.goodputs.records import Record, RecordFile, read
from bench.goodputs.twinpool_backend import TwinpoolBackend
from bench.workloads.arrivals import Arrival, Planned
from bench.workloads.prompts import Prompts
from tests.unit.bench import goodput_servers
from tests.unit.bench.goodput_servers import Script

PROMPTS = Prompts(seed=0, run=1, vocab_size=500)
# More than enough for answers that come, little enough to wait for those that must not.
PATIENCE_S = 30.0


class Twinpool:
    """Our own router's kind."""

    serve = staticmethod(goodput_servers.twinpool)

    @staticmethod
    def backend(address: str) -> Backend:
        return TwinpoolBackend(address, ca=None, token_file=None)


class OpenAI:
    """The others' kind."""

    serve = staticmethod(goodput_servers.openai)

    @staticmethod
    def backend(address: str) -> Backend:
        return OpenAIBackend(address)


Kind = type[Twinpool] | type[OpenAI]


@asynccontextmanager
async def opened(kind: Kind, script: Script) -> AsyncIterator[Backend]:
    async with kind.serve(script) as address:
        backend = kind.backend(address)
        await backend.describe()
        yield backend
        await backend.close()


BOTH = pytest.mark.parametrize("kind", [Twinpool, OpenAI])


def planned(count: int, gap_s: float, *, output_tokens: int = 4) -> list[Planned]:
    arrivals = [
        Arrival(at_s=number * gap_s, prompt_tokens=20 + number, output_tokens=output_tokens)
        for number in range(count)
    ]
    return [
        Planned(index=index, part="window", arrival=each) for index, each in enumerate(arrivals)
    ]


def loop_of(
    backend: Backend, note: Callable[[Record], None], timeout_s: float = PATIENCE_S
) -> OpenLoop:
    return OpenLoop(backend, PROMPTS, note, run=1, rate=2.0, timeout_s=timeout_s)


async def run(backend: Backend, requests: list[Planned], **more: float) -> list[Record]:
    found: list[Record] = []
    await loop_of(backend, found.append, **more).run(requests)
    return sorted(found, key=lambda record: record.index)


@BOTH
async def test_times_are_those_that_the_server_has_noted(kind: Kind) -> None:
    script = Script(ttft_s=0.5, tpot_s=0.1)
    requests = planned(12, 0.05, output_tokens=6)
    async with opened(kind, script) as backend:
        found = await run(backend, requests)
    assert [record.outcome for record in found] == ["finished"] * 12
    assert {record.output_tokens for record in found} == {6}
    assert [record.prompt_tokens for record in found] == [20 + n for n in range(12)]
    assert {len(record.itl_s) for record in found} == {5}
    noted = {len(prompt) - 20: n for n, prompt in enumerate(script.prompts)}
    ttfts_s = [script.ttfts_s()[noted[n]] for n in range(12)]
    tpots_s = [script.tpots_s()[noted[n]] for n in range(12)]
    # On a busy machine most are some milliseconds on their way; what is measured wrong, always is.
    added = [record.ttft_s / ttft_s for record, ttft_s in zip(found, ttfts_s, strict=True)]
    assert 1.0 <= min(added) <= 1.02
    off = [abs(record.tpot_s / tpot_s - 1) for record, tpot_s in zip(found, tpots_s, strict=True)]
    assert min(off) <= 0.02
    assert all(record.late_s >= 0 for record in found)


@BOTH
async def test_a_server_that_stalls_does_not_slow_the_arrivals(kind: Kind) -> None:
    script = Script(gate=asyncio.Event())
    requests = planned(20, 0.01)

    async def all_came() -> None:
        while len(script.came_s) < len(requests):
            await asyncio.sleep(0.01)
        assert script.gate is not None
        script.gate.set()

    async with opened(kind, script) as backend, asyncio.timeout(PATIENCE_S):
        found, _ = await asyncio.gather(run(backend, requests), all_came())
    assert all(record.is_finished for record in found)


@BOTH
async def test_of_the_same_a_closed_loop_would_see_no_end(kind: Kind) -> None:
    script = Script(gate=asyncio.Event())
    requests = planned(20, 0.01)
    room = asyncio.Semaphore(4)

    async with opened(kind, script) as backend:

        async def one(each: Planned) -> None:
            async with room:
                await run(backend, [each])

        closed = asyncio.gather(*map(one, requests))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(closed, 0.5)
    assert len(script.came_s) <= 4


@BOTH
async def test_what_is_asked_is_what_was_made_for_the_request(kind: Kind) -> None:
    script = Script()
    requests = planned(3, 0.0)
    async with opened(kind, script) as backend:
        await run(backend, requests)
    assert sorted(script.prompts) == sorted(PROMPTS.of(each).tolist() for each in requests)


@BOTH
async def test_refusals_broken_answers_and_silence_are_told_apart(kind: Kind) -> None:
    script = Script(refuses=True)
    async with opened(kind, script) as backend:
        [refused] = await run(backend, planned(1, 0.0))
        script.refuses, script.breaks_after = False, 2
        [broken] = await run(backend, planned(1, 0.0))
        script.breaks_after, script.gate = None, asyncio.Event()
        [silent] = await run(backend, planned(1, 0.0), timeout_s=0.1)
    assert (refused.outcome, refused.ttft_s) == ("refused", 0.0)
    assert "no room" in refused.error
    # A router says that it has failed, a server of HTTP just goes away.
    assert broken.outcome in ("failed", "lost")
    assert broken.ttft_s > 0
    assert len(broken.itl_s) == 1
    assert (silent.outcome, silent.error) == ("timeout", "no end after 0.1 s")


@BOTH
async def test_a_server_that_dies_ends_the_run_and_leaves_the_records(
    kind: Kind, tmp_path: Path
) -> None:
    path, ended = tmp_path / "records.jsonl", asyncio.Event()
    requests = planned(3000, 0.01)
    async with AsyncExitStack() as server:
        backend = kind.backend(await server.enter_async_context(kind.serve(Script())))
        with RecordFile(path) as file:

            def note(record: Record) -> None:
                file.write(record)
                ended.set()

            running = asyncio.create_task(loop_of(backend, note).run(requests))
            await ended.wait()
            await server.aclose()
            with pytest.raises(ServerLost, match="found no server"):
                await running
        await backend.close()
    outcomes = Counter(record.outcome for record in read(path))
    assert outcomes["finished"] >= 1
    assert outcomes["lost"] >= LOST_IN_ROW
    assert outcomes.total() < len(requests)


async def test_a_cancelled_run_keeps_what_was_under_way() -> None:
    script = Script(gate=asyncio.Event())
    found: list[Record] = []
    async with opened(Twinpool, script) as backend:
        running = asyncio.create_task(loop_of(backend, found.append).run(planned(3, 0.0)))
        while len(script.came_s) < 3:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert [record.outcome for record in found] == ["stopped"] * 3


async def test_what_can_not_be_noted_ends_the_run_with_its_own_error() -> None:
    def full(record: Record) -> None:
        raise OSError("no space left")

    async with opened(Twinpool, Script()) as backend:
        with pytest.raises(OSError, match="no space left"):
            await loop_of(backend, full).run(planned(100, 0.01))


async def test_the_first_request_says_what_is_wrong() -> None:
    async with opened(OpenAI, Script(refuses=True)) as backend:
        arrival = Arrival(at_s=7.0, prompt_tokens=5, output_tokens=2)
        with pytest.raises(SendError, match=r"429.*no room"):
            await check(backend, PROMPTS, arrival, timeout_s=PATIENCE_S)


def test_a_file_that_was_cut_short_gives_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    record = Record(
        run=1,
        rate=2.0,
        index=0,
        part="window",
        outcome="finished",
        scheduled_s=0.0,
        sent_s=0.1,
        ended_s=1.0,
        ttft_s=0.2,
        itl_s=(0.1, 0.2),
        prompt_tokens=3,
        asked_tokens=3,
        output_tokens=3,
    )
    with RecordFile(path) as file:
        file.write(record)
        assert read(path) == [record]  # at once
        file.write(record)
    path.write_text(path.read_text()[:-5])
    assert read(path) == [record]
