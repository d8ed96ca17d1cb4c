"""The synchronous client. Owns its channel and its streams; usable from many threads."""

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message as WireMessage
from twinpool import wire
from twinpool.channel import QUESTION_TIMEOUT_S, checked_address, transport
from twinpool.credentials import Bearer, FilePath, TlsChoice, tls_of
from twinpool.errors import from_rpc_error
from twinpool.types import Chunk, Completion, Description, GenerateOptions, Prompt, Status
from twinpool.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc

_Answer = TypeVar("_Answer", bound=WireMessage)


class Stream:
    """An answer as it comes: iterate over it for its chunks. Made by `Client.generate`.

    Leaving it early aborts the request at once: a `break` out of a for loop over it, the end of
    its `with` block, `close()`, or any exception. Raises a TwinpoolError where the request fails.
    """

    def __init__(
        self, call: "grpc._CallIterator[inference_pb2.GenerateResponse]", address: str
    ) -> None:
        self._call = call
        self._messages = iter(call)
        self._address = address
        self._closed = False
        self._finished = False
        self._request_id: str | None = None

    @property
    def request_id(self) -> str | None:
        """The request's name in the servers' logs; None before the first chunk."""
        return self._request_id

    def close(self) -> None:
        """Abort the request if it has not ended; may be called from any thread."""
        self._closed = True
        self._call.cancel()

    def __iter__(self) -> Iterator[Chunk]:
        # A generator of its own, so that a loop that is left closes it, and with it the call.
        try:
            while (chunk := self._next()) is not None:
                yield chunk
        finally:
            self.close()

    def __next__(self) -> Chunk:
        chunk = self._next()
        if chunk is None:
            raise StopIteration
        return chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _next(self) -> Chunk | None:
        """Return the next chunk, None after the last and after `close`."""
        if self._closed:
            return None
        try:
            message = next(self._messages, None)
        except grpc.RpcError as exc:
            if self._closed:  # by another thread
                return None
            self.close()
            raise from_rpc_error(exc, address=self._address, request_id=self._request_id) from exc
        except BaseException:  # KeyboardInterrupt while waiting
            self.close()
            raise
        if message is None:
            self.close()
            wire.check_finished(self._finished, self._request_id)
            return None
        chunk = wire.chunk(message)
        self._request_id = chunk.request_id
        self._finished = chunk.finish_reason is not None
        return chunk


class Client:
    """A connection to a Twinpool router at "host:port"; connects with the first call.

    `token`, or the one in `token_file`, goes with every call as `authorization: Bearer`; it can be
    read on the way unless the connection is TLS. `tls` is True, a CA's PEM file, or a `Tls`;
    `credentials` takes gRPC's own instead. Raises ValueError for files that cannot be used.
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
        self._address = checked_address(address)
        self._bearer = Bearer(token, token_file)
        self._closed = False
        credentials, options = transport(tls_of(tls), credentials)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=options)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._membership = worker_pb2_grpc.MembershipStub(self._channel)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Start generating and return the answer's stream; `GenerateOptions` has the options.

        Raises TypeError for a wrong Python type, InvalidRequest for a number out of any range.
        """
        self._check_open()
        request = wire.generate_request(prompt, options)
        timeout_s = options.get("timeout_s")
        call = self._inference.Generate(
            request, timeout=timeout_s, metadata=self._bearer.metadata()
        )
        return Stream(call, self._address)

    def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Generate and return the whole answer; raises as `generate` and its stream do."""
        with self.generate(prompt, **options) as stream:
            return wire.completion(list(stream))

    def describe(
        self, *, model: str = "", timeout_s: float | None = QUESTION_TIMEOUT_S
    ) -> Description:
        """Return which model is served and what a request may ask for."""
        request = inference_pb2.DescribeRequest(model=model)
        return wire.description(self._ask(self._inference.Describe, request, timeout_s))

    def count_tokens(
        self, prompt: Prompt, *, model: str = "", timeout_s: float | None = QUESTION_TIMEOUT_S
    ) -> int:
        """Return how many tokens a prompt has after template and tokenizer."""
        request = inference_pb2.CountTokensRequest(prompt=wire.wire_prompt(prompt), model=model)
        return self._ask(self._inference.CountTokens, request, timeout_s).tokens

    def status(self, *, timeout_s: float | None = QUESTION_TIMEOUT_S) -> Status:
        """Return the router's view of its pools."""
        request = worker_pb2.GetStatusRequest()
        return wire.status(self._ask(self._membership.GetStatus, request, timeout_s))

    def close(self) -> None:
        """Close the connection; requests that are still running are aborted."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(
        self, call: Callable[..., _Answer], request: WireMessage, timeout_s: float | None
    ) -> _Answer:
        self._check_open()
        try:
            return call(request, timeout=timeout_s, metadata=self._bearer.metadata())
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, address=self._address) from exc

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the client is closed")
