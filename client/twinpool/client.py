"""The synchronous client. Owns its channel and its streams; usable from many threads."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeAlias, TypeVar, Unpack

import grpc
from google.protobuf.message import Message as WireMessage
from twinpool import wire
from twinpool.channel import QUESTION_TIMEOUT_S, checked_addresses, transport
from twinpool.credentials import Bearer, FilePath, TlsChoice, tls_of
from twinpool.errors import TwinpoolError, Unavailable, from_rpc_error, is_lost
from twinpool.failover import Answer, Routers, Tries
from twinpool.types import (
    Chunk,
    Completion,
    Description,
    GenerateOptions,
    Prompt,
    ServedModel,
    Status,
)
from twinpool.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc

_Reply = TypeVar("_Reply", bound=WireMessage)
_Call: TypeAlias = "grpc._CallIterator[inference_pb2.GenerateResponse]"


class Stream:
    """An answer as it comes: iterate over it for its chunks. Made by `Client.generate`.

    Leaving it early aborts the request at once: a `break` out of a for loop over it, the end of
    its `with` block, `close()`, or any exception. Raises a TwinpoolError where the request fails.
    """

    def __init__(self, answer: Answer, start: "Callable[[Answer], _Call]") -> None:
        self._answer = answer
        self._start = start
        self._call = start(answer)
        self._closed = threading.Event()

    @property
    def request_id(self) -> str | None:
        """The request's name in the servers' logs; None before the first chunk."""
        return self._answer.request_id

    @property
    def seed(self) -> int | None:
        """What the answer is drawn with, also where none was given; None before the first chunk."""
        return self._answer.seed

    def close(self) -> None:
        """Abort the request if it has not ended; may be called from any thread."""
        self._closed.set()
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
        while not self._closed.is_set():
            try:
                message = next(self._call, None)
                if message is not None:
                    return self._answer.heard(message)
                self.close()
                wire.check_finished(self._answer.finished, self._answer.request_id)
            except grpc.RpcError as exc:
                if not self._closed.is_set():  # by another thread
                    self._go_on(exc)
            except BaseException:  # KeyboardInterrupt while waiting
                self.close()
                raise
        return None

    def _go_on(self, error: grpc.RpcError) -> None:
        """Ask another router for the rest; raises what the caller gets where none may have it."""
        if self._answer.finished:  # all is here but the goodbye
            self.close()
            return
        try:
            if self._closed.wait(self._answer.failed(error)):
                return
            self._call = self._start(self._answer)
        except TwinpoolError as exc:
            self.close()
            raise exc from (exc.__cause__ or error)
        except BaseException:  # KeyboardInterrupt while waiting
            self.close()
            raise
        if self._closed.is_set():  # by another thread, which has ended the call before this one
            self._call.cancel()


class Client:
    """A connection to a Twinpool router at "host:port"; connects with the first call.

    Of several addresses ("a:9000,b:9000" or a sequence) the first is used until it is lost, then
    the next; answers that had begun go on there, with no token lost or given twice.
    `token`, or the one in `token_file`, goes with every call as `authorization: Bearer`; it can be
    read on the way unless the connection is TLS. `tls` is True, a CA's PEM file, or a `Tls`;
    `credentials` takes gRPC's own instead. Raises ValueError for files that cannot be used.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        token: str | None = None,
        token_file: FilePath | None = None,
        tls: TlsChoice = False,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._routers = Routers(checked_addresses(address))
        self._bearer = Bearer(token, token_file)
        self._closed = False
        credentials, options = transport(tls_of(tls), credentials)
        self._channels = [
            grpc.insecure_channel(one, options=options)
            if credentials is None
            else grpc.secure_channel(one, credentials, options=options)
            for one in self._routers.addresses
        ]
        self._inference = [inference_pb2_grpc.InferenceStub(c) for c in self._channels]
        self._membership = [worker_pb2_grpc.MembershipStub(c) for c in self._channels]

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Start generating and return the answer's stream; `GenerateOptions` has the options.

        Raises TypeError for a wrong Python type, InvalidRequest for a number out of any range.
        """
        self._check_open()
        request = wire.generate_request(prompt, options)
        tries = Tries(self._routers, options.get("timeout_s"))
        answer = Answer(request, tries, wire.trace_metadata(options))
        return Stream(answer, self._start)

    def _start(self, answer: Answer) -> _Call:
        """Ask the router whose turn it is for an answer, or for the rest of it."""
        if self._closed:
            raise Unavailable(
                "the client was closed", reason="CANCELLED", request_id=answer.request_id
            )
        return self._inference[answer.tries.index].Generate(
            answer.next_request(),
            timeout=answer.tries.remaining_s(),
            metadata=(*self._bearer.metadata(), *answer.trace),
        )

    def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Generate and return the whole answer; raises as `generate` and its stream do."""
        with self.generate(prompt, **options) as stream:
            return wire.completion(list(stream))

    def describe(
        self, *, model: str = "", timeout_s: float | None = QUESTION_TIMEOUT_S
    ) -> Description:
        """Return what a request to a model may ask for; to the only one unless it is named."""
        request = inference_pb2.DescribeRequest(model=model)
        return wire.description(
            self._ask(lambda n: self._inference[n].Describe, request, timeout_s)
        )

    def models(self, *, timeout_s: float | None = QUESTION_TIMEOUT_S) -> tuple[ServedModel, ...]:
        """Return the models that are served, by name."""
        request = inference_pb2.ListModelsRequest()
        return wire.models(self._ask(lambda n: self._inference[n].ListModels, request, timeout_s))

    def count_tokens(
        self, prompt: Prompt, *, model: str = "", timeout_s: float | None = QUESTION_TIMEOUT_S
    ) -> int:
        """Return how many tokens a prompt has after template and tokenizer."""
        request = inference_pb2.CountTokensRequest(prompt=wire.wire_prompt(prompt), model=model)
        return self._ask(lambda n: self._inference[n].CountTokens, request, timeout_s).tokens

    def status(self, *, timeout_s: float | None = QUESTION_TIMEOUT_S) -> Status:
        """Return the router's view of its pools."""
        request = worker_pb2.GetStatusRequest()
        return wire.status(self._ask(lambda n: self._membership[n].GetStatus, request, timeout_s))

    def close(self) -> None:
        """Close the connection; requests that are still running are aborted."""
        self._closed = True
        for channel in self._channels:
            channel.close()

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
        self,
        call_of: Callable[[int], Callable[..., _Reply]],
        request: WireMessage,
        timeout_s: float | None,
    ) -> _Reply:
        """Ask routers in turn until one answers; `call_of` is the question to one of them."""
        self._check_open()
        tries = Tries(self._routers, timeout_s)
        while True:
            call = call_of(tries.index)
            try:
                return call(request, timeout=tries.remaining_s(), metadata=self._bearer.metadata())
            except grpc.RpcError as exc:
                meant = from_rpc_error(exc, address=tries.address)
                try:
                    wait_s = tries.failed(meant, lost=is_lost(exc))
                except TwinpoolError as error:
                    raise error from exc
            time.sleep(wait_s)
            self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the client is closed")
