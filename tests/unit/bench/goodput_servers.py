"""Servers with known delays, of both kinds that the goodput benchmark asks; they note what they do.

Owns nothing of the benchmark: what a server has noted is what figures are compared with.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from twinpool.v1 import common_pb2, inference_pb2, inference_pb2_grpc

from service.errors import Refused
from service.status import StatusInterceptor


@dataclass
class Script:
    """How to answer, and what was answered.

    Attributes:
        gate: Answers wait until it is set.
        breaks_after: Messages after which an answer breaks off; None for never.
        refuses: Whether all is refused.
        came_s: When each request came.
        sent_s: When each message with a token went out, for each request.
        prompts: The token ids that were asked with.
        questions: All that was asked, of a server of OpenAI's completions.
        hands_over: What an answer that does not stream says of its KV.
    """

    ttft_s: float = 0.0
    tpot_s: float = 0.0
    gate: asyncio.Event | None = None
    breaks_after: int | None = None
    refuses: bool = False
    came_s: list[float] = field(default_factory=list)
    sent_s: list[list[float]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)
    hands_over: dict[str, Any] | None = None

    async def tokens(self, prompt: list[int], count: int) -> AsyncIterator[int]:
        """Give the numbers of tokens when they are due."""
        self.came_s.append(time.perf_counter())
        self.prompts.append(prompt)
        sent: list[float] = []
        self.sent_s.append(sent)
        if self.gate is not None:
            await self.gate.wait()
        for number in range(count):
            if number == self.breaks_after:
                raise ConnectionResetError("as the script has it")
            await asyncio.sleep(self.tpot_s if number else self.ttft_s)
            sent.append(time.perf_counter())
            yield number

    def ttfts_s(self) -> list[float]:
        """From each request to its first token."""
        return [sent[0] - came for came, sent in zip(self.came_s, self.sent_s, strict=True)]

    def tpots_s(self) -> list[float]:
        """The mean time between the tokens of each request."""
        return [(sent[-1] - sent[0]) / (len(sent) - 1) for sent in self.sent_s]


class _Inference(inference_pb2_grpc.InferenceServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        if self._script.refuses:
            raise Refused("NO_ROOM", needed=9, free=0, retry_after_s=1.0, message="no room")
        prompt, count = list(request.prompt.token_ids.ids), request.stop.max_new_tokens
        async for number in self._script.tokens(prompt, count):
            message = inference_pb2.GenerateResponse(request_id="1", text="x", token_ids=[number])
            if number == count - 1:
                message.finish_reason = common_pb2.FINISH_REASON_LENGTH
                message.usage.prompt_tokens = len(prompt)
                message.usage.completion_tokens = count
            yield message

    async def Describe(
        self, request: inference_pb2.DescribeRequest, context: Any
    ) -> inference_pb2.DescribeResponse:
        return inference_pb2.DescribeResponse(
            model="mock", version="0", vocab_size=500, max_model_len=4096, max_request_tokens=2048
        )

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        raise NotImplementedError

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: Any
    ) -> inference_pb2.CountTokensResponse:
        raise NotImplementedError


@asynccontextmanager
async def twinpool(script: Script) -> AsyncIterator[str]:
    """Run a router's public service; gives its address."""
    server = grpc.aio.server(interceptors=[StatusInterceptor()])
    inference_pb2_grpc.add_InferenceServicer_to_server(_Inference(script), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def openai(script: Script) -> AsyncIterator[str]:
    """Run a server of OpenAI's completions; gives its URL."""
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while True:
                await _http(script, reader, writer)
        except (OSError, EOFError):
            pass
        finally:
            writer.close()
            tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _http(script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = next(
        int(line.partition(":")[2])
        for line in head.split("\r\n")
        if line.startswith("content-length")
    )
    body = await reader.readexactly(length)
    if head.startswith("get /v1/models"):
        _whole(writer, 200, {"data": [{"id": "mock", "owned_by": "tests", "max_model_len": 2048}]})
        return
    if script.refuses:
        _whole(writer, 429, {"error": "no room"})
        return
    asked = json.loads(body)
    script.questions.append(asked)
    if not asked["stream"]:
        _whole(writer, 200, {"choices": [{"text": "x"}], "kv_transfer_params": script.hands_over})
        return
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    _chunk(writer, b": a comment\n\n")
    async for _ in script.tokens(asked["prompt"], asked["max_tokens"]):
        _event(writer, {"choices": [{"text": "x"}], "usage": None})
    usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
    _event(writer, {"choices": [], "usage": usage})
    _chunk(writer, b"data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")


def _whole(writer: asyncio.StreamWriter, status: int, said: dict[str, Any]) -> None:
    body = json.dumps(said).encode()
    writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))


def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    text = b"data: " + json.dumps(event).encode() + b"\n\n"
    # In two chunks, as a proxy may cut it.
    _chunk(writer, text[:9])
    _chunk(writer, text[9:])


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
