"""The asyncio client. Owns its channel and its streams; belongs to one event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self, TypeAlias, TypeVar, Unpack

import grpc
from google.protobuf.message import Message as WireMessage
from twinpool import wire
from twinpool.channel import QUESTION_TIMEOUT_S, checked_address, transport
from twinpool.credentials import Bearer, FilePath, TlsChoice, tls_of
from twinpool.errors import Unavailable, from_rpc_error
from twinpool.types import Chunk, Completion, Description, GenerateOptions, Prompt, Status
from twinpool.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc

_Question = TypeVar("_Question", bound=WireMessage)
_Answer = TypeVar("_Answer", bound=WireMessage)
_Call: TypeAlias = (
    "grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]"
)


class AsyncStream:
    """An answer as it comes: iterate over it for its chunks. Made by `AsyncClient.generate`.

    Leaving it early aborts the request: a `break` out of an async for loop over it, the end of
    its `async with` block, `close()`, a cancelled task, or any exception. Raises a TwinpoolError
    where the request fails.
    """

    def __init__(self, call: _Call, address: str) -> None:
        self._call = call
        self._address = address
        self._closed = False
        self._finished = False
        self._request_id: str | None = None

    @property
    def request_id(self) -> str | None:
        """The request's name in the servers' logs; None before the first chunk."""
        return self._request_id

    def close(self) -> None:
        """Abort the request if it has not ended."""
        self._closed = True
        self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        # A generator of its own, so that a loop that is left closes it, and with it the call.
        try:
            while (chunk := await self._next()) is not None:
                yield chunk
        finally:
            self.close()

    async def __anext__(self) -> Chunk:
        chunk = await self._next()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def _next(self) -> Chunk | None:
        """Return the next chunk, None after the last and after `close`."""
        if self._closed:
            return None
        try:
            message = await self._call.read()
        except grpc.RpcError as exc:
            self.close()
            raise from_rpc_error(exc, address=self._address, request_id=self._request_id) from exc
        except asyncio.CancelledError as exc:
            closed, self._closed = self._closed, True
            self._call.cancel()
            if _task_is_cancelled():
                raise
            if closed:  # by another task
                return None
            raise _cancelled(self._address, self._request_id) from exc
        if not isinstance(message, inference_pb2.GenerateResponse):  # grpc.aio.EOF
            self.close()
            wire.check_finished(self._finished, self._request_id)
            return None
        chunk = wire.chunk(message)
        self._request_id = chunk.request_id
        self._finished = chunk.finish_reason is not None
        return chunk


class AsyncClient:
    """A connection to a Twinpool router at "host:port"; made in the event loop that uses it.

    Connects with the first call. `token`, or the one in `token_file`, goes with every call as
    `authorization: Bearer`; it can be read on the way unless the connection is TLS.
    `tls` is True, a CA's PEM file, or a `Tls`; `credentials` takes gRPC's own instead. Raises
    ValueError for files that cannot be used.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        token_file: FilePath | None = None,
        tls: TlsChoice = False,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        asyncio.get_running_loop()  # raises RuntimeError where there is none
        self._address = checked_address(address)
        self._bearer = Bearer(token, token_file)
        self._closed = False
        credentials, options = transport(tls_of(tls), credentials)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._membership = worker_pb2_grpc.MembershipStub(self._channel)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Start generating and return the answer's stream; `GenerateOptions` has the options.

        Raises TypeError for a wrong Python type, InvalidRequest for a number out of any range.
        """
        self._check_open()
        request = wire.generate_request(prompt, options)
        timeout_s = options.get("timeout_s")
        call = self._inference.Generate(
            request, timeout=timeout_s, metadata=self._bearer.metadata()
        )
        return AsyncStream(call, self._address)

    async def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Generate and return the whole answer; raises as `generate` and its stream do."""
        async with self.generate(prompt, **options) as stream:
            return wire.completion([chunk async for chunk in stream])

    async def describe(
        self, *, model: str = "", timeout_s: float | None = QUESTION_TIMEOUT_S
    ) -> Description:
        """Return which model is served and what a request may ask for."""
        request = inference_pb2.DescribeRequest(model=model)
        return wire.description(await self._ask(self._inference.Describe, request, timeout_s))

    async def count_tokens(
        self, prompt: Prompt, *, model: str = "", timeout_s: float | None = QUESTION_TIMEOUT_S
    ) -> int:
        """Return how many tokens a prompt has after template and tokenizer."""
        request = inference_pb2.CountTokensRequest(prompt=wire.wire_prompt(prompt), model=model)
        return (await self._ask(self._inference.CountTokens, request, timeout_s)).tokens

    async def status(self, *, timeout_s: float | None = QUESTION_TIMEOUT_S) -> Status:
        """Return the router's view of its pools."""
        request = worker_pb2.GetStatusRequest()
        return wire.status(await self._ask(self._membership.GetStatus, request, timeout_s))

    async def close(self) -> None:
        """Close the connection; requests that are still running are aborted."""
        self._closed = True
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _ask(
        self,
        call: Callable[..., "grpc.aio.UnaryUnaryCall[_Question, _Answer]"],
        request: _Question,
        timeout_s: float | None,
    ) -> _Answer:
        self._check_open()
        try:
            return await call(request, timeout=timeout_s, metadata=self._bearer.metadata())
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, address=self._address) from exc
        except asyncio.CancelledError as exc:
            if _task_is_cancelled():
                raise
            raise _cancelled(self._address, None) from exc

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the client is closed")


def _task_is_cancelled() -> bool:
    """Tell a task that is cancelled from a call that is: gRPC raises CancelledError for both."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _cancelled(address: str, request_id: str | None) -> Unavailable:
    return Unavailable(
        f"no answer from {address}: the call was cancelled, by the server or by closing the client",
        reason="CANCELLED",
        request_id=request_id,
    )
