"""The clients that load a router: HTTP/2 against a real gRPC server, HTTP/1.1 against the mocks."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from twinpool.v1 import common_pb2, inference_pb2, inference_pb2_grpc

from bench.routers.calls import Connection
from bench.routers.http_calls import HttpCalls
from bench.routers.http_mocks import DONE, HttpWorkers
from bench.routers.load import HTTP_PATH, METHOD, Client, Grpc, Http, Streams, arrivals
from bench.routers.pace import Paces
from bench.routers.stamps import Stamps
from bench.sides.servers import free_port
from service.errors import Unavailable
from service.status import StatusInterceptor

LARGE = 100_000


class Server(inference_pb2_grpc.InferenceServicer):
    """Says as many messages as tokens are asked for; refuses a request for 13."""

    def __init__(self) -> None:
        self.open = 0

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        tokens = request.stop.max_new_tokens
        if tokens == 13:
            raise Unavailable("an unlucky number", reason="TEST")
        self.open += 1
        try:
            for number in range(1, tokens + 1):
                text = "x" * LARGE if tokens == 2 else str(len(request.prompt.text))
                part = inference_pb2.GenerateResponse(text=text, token_ids=[number])
                if number == tokens:
                    part.finish_reason = common_pb2.FINISH_REASON_LENGTH
                yield part
            if tokens == 0:
                await asyncio.Event().wait()
        finally:
            self.open -= 1

    async def Describe(
        self, request: inference_pb2.DescribeRequest, context: Any
    ) -> inference_pb2.DescribeResponse:
        raise NotImplementedError

    async def ListModels(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: Any
    ) -> inference_pb2.CountTokensResponse:
        raise NotImplementedError


class Heard:
    """An answer that keeps all it hears."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.end = asyncio.Event()

    def message(self, data: bytes, now: float) -> None:
        self.messages.append(data)

    def ended(self) -> None:
        self.end.set()

    async def parts(self) -> list[inference_pb2.GenerateResponse]:
        async with asyncio.timeout(10):
            await self.end.wait()
        return [inference_pb2.GenerateResponse.FromString(data) for data in self.messages]


@pytest.fixture
async def served() -> AsyncIterator[tuple[Server, Connection]]:
    server, servicer = grpc.aio.server(interceptors=[StatusInterceptor()]), Server()
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    connection = await Connection.open(f"127.0.0.1:{port}", METHOD, time.monotonic)
    yield servicer, connection
    connection.close()
    await server.stop(0)


def ask(connection: Connection, tokens: int, prompt: str = "prompt") -> Heard:
    heard = Heard()
    connection.call(Grpc().request(tokens, prompt), heard)
    return heard


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def test_calls_of_one_connection_each_get_their_own_answer(
    served: tuple[Server, Connection],
) -> None:
    heard = [ask(served[1], tokens) for tokens in (3, 5)]
    assert [[list(p.token_ids) for p in await each.parts()] for each in heard] == [
        [[1], [2], [3]],
        [[1], [2], [3], [4], [5]],
    ]


async def test_messages_beyond_a_frame_arrive_whole(served: tuple[Server, Connection]) -> None:
    parts = await ask(served[1], 2).parts()
    assert [len(part.text) for part in parts] == [LARGE, LARGE]


async def test_more_requests_than_the_server_leaves_room_for_arrive_all_the_same(
    served: tuple[Server, Connection],
) -> None:
    heard = [ask(served[1], 1, "x" * 10_000) for _ in range(60)]
    texts = [part.text for each in heard for part in await each.parts()]
    assert texts == ["10000"] * 60


async def test_a_refused_call_ends_without_a_message(served: tuple[Server, Connection]) -> None:
    assert await ask(served[1], 13).parts() == []


async def test_a_cancelled_call_ends_at_the_server(served: tuple[Server, Connection]) -> None:
    servicer, connection = served
    heard = Heard()
    stream = connection.call(Grpc().request(0, "prompt"), heard)
    await until(lambda: servicer.open == 1)
    connection.cancel(stream)
    await until(lambda: servicer.open == 0)
    assert not heard.end.is_set()


async def test_a_client_notes_what_was_answered_and_what_was_not(
    served: tuple[Server, Connection],
) -> None:
    client = Client([served[1]], Grpc(), Stamps(time.monotonic), time.monotonic)
    await arrivals(client, [Grpc().request(4, "p")], 1000.0, 0.02, random.Random(0))
    sent = client.open + client.tally.finished
    ended: list[bool] = []
    client.send(Grpc().request(13, "p"), ended.append)
    await until(lambda: client.open == 0)
    assert ended == [False]
    assert (client.tally.finished, client.tally.unfinished) == (sent, 1)
    assert len(client.tally.refused_after) == 1
    assert client.tally.tokens == client.tally.messages == 4 * sent


async def test_streams_go_on_with_the_next_request_until_they_are_ended(
    served: tuple[Server, Connection],
) -> None:
    client = Client([served[1]], Grpc(), Stamps(time.monotonic), time.monotonic)
    streams = Streams(client, 3, "p", random.Random(0))
    streams.begin(4)
    await until(lambda: client.tally.finished >= 12)
    streams.end()
    await until(lambda: client.open == 0)
    assert client.tally.unfinished == 0


async def test_mock_workers_stream_to_http_clients_at_their_pace() -> None:
    prefill, decode = free_port(), free_port()
    stamps = Stamps(time.monotonic)
    paces = Paces(None, time.monotonic, random.Random(0))
    async with HttpWorkers([prefill], [decode], stamps=stamps, pace=paces):
        calls = HttpCalls(f"127.0.0.1:{decode}", HTTP_PATH, time.monotonic)
        client = Client([calls], Http(), stamps, time.monotonic)
        ended: list[bool] = []
        for tokens in (2, 3, 2):
            client.send(Http().request(tokens, "p"), ended.append)
        await until(lambda: len(ended) == 3)
        client.send(Http().request(5, "p"), ended.append)  # over a connection that is kept
        await until(lambda: len(ended) == 4)
        assert ended == [True] * 4
        assert client.tally.tokens == 2 + 3 + 2 + 5
        assert len(client.tally.on_way) == client.tally.tokens
        calls.close()


async def test_an_http_answer_that_is_no_stream_is_none() -> None:
    prefill = free_port()
    paces = Paces(None, time.monotonic, random.Random(0))
    async with HttpWorkers([prefill], [], stamps=Stamps(time.monotonic), pace=paces):
        calls = HttpCalls(f"127.0.0.1:{prefill}", HTTP_PATH, time.monotonic)
        heard = Heard()
        calls.call(Http().request(2, "p"), heard)
        async with asyncio.timeout(10):
            await heard.end.wait()
        assert heard.messages == []
        assert DONE not in heard.messages
        calls.close()
