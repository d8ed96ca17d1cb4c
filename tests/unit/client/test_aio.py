"""The asyncio client against a server in this process."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from twinpool import AsyncClient, DeadlineExceeded, ServerError, Unavailable

from tests.unit.client.fake_router import (
    PATIENCE_S,
    FakeRouter,
    WaitForClient,
    part,
    running_server,
)

ENDLESS = (part("Hel", 1), part("lo", 2), WaitForClient())


@pytest.fixture
async def client(router: FakeRouter) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(router.address) as client:
        yield client


async def client_left(router: FakeRouter) -> bool:
    return await asyncio.to_thread(router.client_left.wait, PATIENCE_S)


async def test_stream_gives_the_chunks_in_order(client: AsyncClient) -> None:
    async with client.generate("Hi") as stream:
        assert stream.request_id is None
        chunks = [chunk async for chunk in stream]
        assert stream.request_id == "00000000000000ab"
    assert [chunk.text for chunk in chunks] == ["Hel", "lo"]
    assert [chunk.finish_reason for chunk in chunks] == [None, "length"]


async def test_many_completions_run_at_once(client: AsyncClient, router: FakeRouter) -> None:
    answers = await asyncio.gather(*(client.complete(f"prompt {n}") for n in range(32)))
    assert {answer.text for answer in answers} == {"Hello"}
    assert len(router.requests) == 32


async def test_leaving_a_loop_aborts_the_request_while_the_stream_is_still_held(
    client: AsyncClient, router: FakeRouter
) -> None:
    router.script = ENDLESS
    stream = client.generate("Hi")
    async for chunk in stream:
        assert chunk.text == "Hel"
        break
    assert await client_left(router)
    assert [chunk async for chunk in stream] == []


async def test_leaving_the_context_aborts_the_request(
    client: AsyncClient, router: FakeRouter
) -> None:
    router.script = ENDLESS
    async with client.generate("Hi") as stream:
        assert (await anext(stream)).text == "Hel"
    assert await client_left(router)


@pytest.mark.parametrize("whole", [True, False])
async def test_cancelled_task_aborts_the_request(
    client: AsyncClient, router: FakeRouter, whole: bool
) -> None:
    router.script = ENDLESS
    stream = client.generate("Hi")
    await anext(stream), await anext(stream)
    waiting = client.complete("Hi") if whole else anext(stream)
    task = asyncio.ensure_future(waiting)
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert await client_left(router)


async def test_time_limit_around_an_answer_aborts_the_request(
    client: AsyncClient, router: FakeRouter
) -> None:
    router.script = ENDLESS
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await client.complete("Hi")
    assert await client_left(router)


async def test_close_by_another_task_ends_the_stream(
    client: AsyncClient, router: FakeRouter
) -> None:
    router.script = ENDLESS
    stream = client.generate("Hi")
    asyncio.get_running_loop().call_later(0.3, stream.close)
    assert len([chunk async for chunk in stream]) <= 2
    assert await client_left(router)


async def test_closing_the_client_ends_its_streams_with_an_error(
    client: AsyncClient, router: FakeRouter
) -> None:
    router.script = ENDLESS
    stream = client.generate("Hi")
    await anext(stream), await anext(stream)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.05)
    await client.close()
    with pytest.raises(Unavailable, match="closing the client"):
        await waiting
    assert await client_left(router)
    with pytest.raises(ValueError, match="closed"):
        client.generate("Hi")
    with pytest.raises(ValueError, match="closed"):
        await client.status()


async def test_answer_without_its_last_message_is_an_error(
    client: AsyncClient, router: FakeRouter
) -> None:
    router.script = (part("Hel", 1),)
    with pytest.raises(ServerError, match="broke off"):
        await client.complete("Hi")


async def test_timeout_is_the_calls_deadline(client: AsyncClient, router: FakeRouter) -> None:
    router.script = ENDLESS
    with pytest.raises(DeadlineExceeded):
        await client.complete("Hi", timeout_s=0.3)
    assert await client_left(router)


async def test_unreachable_server_is_named() -> None:
    with running_server(router := FakeRouter()):
        pass
    async with AsyncClient(router.address) as client:
        with pytest.raises(Unavailable, match=f"no answer from {router.address}"):
            await client.complete("Hi")
        with pytest.raises(Unavailable, match=router.address):
            await client.status()


async def test_server_that_dies_in_mid_answer_is_unavailable() -> None:
    router = FakeRouter(script=ENDLESS)
    with running_server(router) as server:
        async with AsyncClient(router.address) as client:
            stream = client.generate("Hi")
            await anext(stream), await anext(stream)
            server.stop(0)
            with pytest.raises(Unavailable):
                await anext(stream)


async def test_questions_are_answered(router: FakeRouter) -> None:
    async with AsyncClient(router.address, token="secret") as client:
        assert (await client.describe()).model == "tiny"
        assert router.metadata["authorization"] == "Bearer secret"
        assert await client.count_tokens("four") == 4
        assert [model.name for model in await client.models()] == ["tiny", "wide"]
        assert (await client.status()).instances[0].running == 2


def test_client_outside_an_event_loop_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient("127.0.0.1:1")
