import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status
from twinpool.v1 import inference_pb2_grpc as inference
from twinpool.v1.inference_pb2 import (
    CountTokensRequest,
    DescribeRequest,
    DescribeResponse,
    GenerateRequest,
    GenerateResponse,
)

from service.channels import dial
from service.errors import (
    DeadlineExceeded,
    Incompatible,
    Internal,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Refused,
    ServiceError,
    Unauthenticated,
    Unavailable,
    WorkFailed,
)
from service.lifecycle import Server
from service.status import from_rpc_error

ERRORS = [
    (InvalidRequest("stop", 9, "give at most 8"), grpc.StatusCode.INVALID_ARGUMENT),
    (
        Refused("KV_FULL", needed=9, free=4, retry_after_s=1.25),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ),
    (Refused("NEVER_FITS", needed=9, free=4), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable("no decode instance", reason="NO_WORKER"), grpc.StatusCode.UNAVAILABLE),
    (Unavailable("draining", retry_after_s=2.0), grpc.StatusCode.UNAVAILABLE),
    (WorkFailed("gone", reason="PeerLost", retryable=True), grpc.StatusCode.ABORTED),
    (WorkFailed("bad", reason="LayoutMismatch", retryable=False), grpc.StatusCode.INTERNAL),
    (
        WorkFailed("late at prefill", reason="DeadlineExceeded", retryable=False),
        grpc.StatusCode.DEADLINE_EXCEEDED,
    ),
    (
        WorkFailed("late at prefill", reason="Aborted", retryable=False),
        grpc.StatusCode.CANCELLED,
    ),
    (DeadlineExceeded(), grpc.StatusCode.DEADLINE_EXCEEDED),
    (NotFound("no model 'x'"), grpc.StatusCode.NOT_FOUND),
    (Incompatible("another model"), grpc.StatusCode.FAILED_PRECONDITION),
    (Unauthenticated("no token"), grpc.StatusCode.UNAUTHENTICATED),
    (PermissionDenied("no right"), grpc.StatusCode.PERMISSION_DENIED),
    (Internal("internal error 1"), grpc.StatusCode.INTERNAL),
]


class Inference(inference.InferenceServicer):
    """Answers every call by what the test gave it to raise."""

    def __init__(self, fail: Callable[[], Any]) -> None:
        self.fail = fail

    async def Describe(self, request: DescribeRequest, context: Any) -> DescribeResponse:
        self.fail()
        return DescribeResponse(model="m")

    async def ListModels(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def CountTokens(self, request: CountTokensRequest, context: Any) -> Any:
        await context.abort(grpc.StatusCode.NOT_FOUND, "plain abort")

    async def Generate(
        self, request: GenerateRequest, context: Any
    ) -> AsyncIterator[GenerateResponse]:
        yield GenerateResponse(text="one")
        self.fail()


@asynccontextmanager
async def stub_for(fail: Callable[[], Any]) -> AsyncIterator["inference.InferenceAsyncStub"]:
    server = Server("test")
    server.add(inference.add_InferenceServicer_to_server, Inference(fail), "twinpool.v1.Inference")
    await server.start()
    channel = dial(server.address)
    try:
        yield inference.InferenceStub(channel)
    finally:
        await channel.close(None)
        await server.stop()


def raiser(error: BaseException) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail


async def failure(error: BaseException) -> grpc.aio.AioRpcError:
    async with stub_for(raiser(error)) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Describe(DescribeRequest())
    return caught.value


@pytest.mark.parametrize(("error", "code"), ERRORS)
async def test_error_comes_back_as_it_was_raised(
    error: ServiceError, code: grpc.StatusCode
) -> None:
    call_error = await failure(error)
    assert call_error.code() is code
    back = from_rpc_error(call_error)
    assert type(back) is type(error)
    assert vars(back) == vars(error)
    assert back.retryable == error.retryable


async def test_refusal_with_a_time_carries_retry_info_and_pushback() -> None:
    error = await failure(Refused("KV_FULL", needed=9, free=4, retry_after_s=1.25))
    info, retry = details(error, ErrorInfo), details(error, RetryInfo)
    assert (info.reason, info.domain) == ("KV_FULL", "twinpool")
    assert dict(info.metadata) == {"needed": "9", "free": "4"}
    assert retry.retry_delay.ToMilliseconds() == 1250
    assert pushback(error) == "1250"


async def test_refusal_for_ever_carries_no_retry_info() -> None:
    error = await failure(Refused("NEVER_FITS", needed=9, free=4))
    assert details(error, RetryInfo) is None
    assert pushback(error) == "-1"


async def test_error_without_a_time_leaves_it_to_the_client_when_to_retry() -> None:
    error = await failure(Unavailable("no decode instance", reason="NO_WORKER"))
    assert pushback(error) is None


@pytest.mark.parametrize(
    ("retry_after_s", "calls"), [(0.01, 3), (None, 1)], ids=["retried", "not retried"]
)
async def test_grpc_itself_retries_where_the_pushback_lets_it(
    retry_after_s: float | None, calls: int
) -> None:
    made: list[None] = []

    def refuse() -> None:
        made.append(None)
        raise Refused("KV_FULL", needed=9, free=4, retry_after_s=retry_after_s)

    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.01s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }
    config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]}
    server = Server("test")
    service = Inference(refuse)
    server.add(inference.add_InferenceServicer_to_server, service, "twinpool.v1.Inference")
    await server.start()
    options = [("grpc.service_config", json.dumps(config))]
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference.InferenceStub(channel).Describe(DescribeRequest())
    await server.stop()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(made) == calls


async def test_invalid_request_names_the_field() -> None:
    error = await failure(InvalidRequest("stop", 9, "give at most 8"))
    violation = details(error, BadRequest).field_violations[0]
    assert (violation.field, violation.description) == ("stop", "give at most 8")
    assert error.details() == "stop: found 9; give at most 8"


async def test_huge_message_still_fits_the_trailers() -> None:
    error = await failure(Unavailable("x" * 100_000))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert from_rpc_error(error).message == "x" * 1000


async def test_error_after_the_first_message_of_a_stream() -> None:
    async with stub_for(raiser(Unavailable("decode is gone", reason="LOST"))) as stub:
        messages = aiter(stub.Generate(GenerateRequest()))
        assert (await anext(messages)).text == "one"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(messages)
    assert from_rpc_error(caught.value).reason == "LOST"


async def test_error_out_of_a_task_group_is_unwrapped() -> None:
    group = ExceptionGroup("tasks", [ExceptionGroup("inner", [NotFound("no such model")])])
    assert (await failure(group)).code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("kind", "code"),
    [(NotFound, grpc.StatusCode.NOT_FOUND), (ValueError, grpc.StatusCode.INTERNAL)],
)
async def test_error_that_is_its_own_causes_cause_ends_the_call(
    kind: type[Exception], code: grpc.StatusCode
) -> None:
    error, other = kind("the first"), ValueError("raised for it")
    error.__cause__, other.__cause__ = other, error
    assert (await failure(error)).code() is code


async def test_defect_shows_an_id_and_logs_a_trace_without_values(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    error = await failure(ValueError("the secret prompt"))
    assert error.code() is grpc.StatusCode.INTERNAL
    message = error.details() or ""
    error_id = message.split()[2].rstrip(";")
    assert error_id in caplog.text
    assert "ValueError" in caplog.text
    assert "test_status.py" in caplog.text
    assert "secret prompt" not in caplog.text + message


async def test_plain_abort_passes_through() -> None:
    async with stub_for(lambda: None) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CountTokens(CountTokensRequest())
    assert caught.value.details() == "plain abort"
    assert from_rpc_error(caught.value).message == "plain abort"


async def test_cancelled_stream_ends_the_handler() -> None:
    ended = asyncio.Event()

    class Endless(Inference):
        async def Generate(
            self, request: GenerateRequest, context: Any
        ) -> AsyncIterator[GenerateResponse]:
            try:
                yield GenerateResponse(text="one")
                await asyncio.sleep(60)
            finally:
                ended.set()

    server = Server("test")
    servicer = Endless(lambda: None)
    server.add(inference.add_InferenceServicer_to_server, servicer, "twinpool.v1.Inference")
    await server.start()
    async with dial(server.address) as channel:
        call = inference.InferenceStub(channel).Generate(GenerateRequest())
        await anext(aiter(call))
        call.cancel()
        async with asyncio.timeout(5):
            await ended.wait()
    await server.stop()


async def test_status_of_nobody_listening_is_unavailable() -> None:
    async with dial("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference.InferenceStub(channel).Describe(DescribeRequest())
    assert isinstance(from_rpc_error(caught.value), Unavailable)


def pushback(error: grpc.aio.AioRpcError) -> Any:
    trailing: Any = error.trailing_metadata()
    return dict(trailing).get("grpc-retry-pushback-ms")


def details(error: grpc.aio.AioRpcError, kind: type[Any]) -> Any:
    status = rpc_status.from_call(error)
    assert status is not None
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            message = kind()
            packed.Unpack(message)
            return message
    return None


@pytest.mark.parametrize("method", ["Describe", "Generate"])
async def test_bytes_that_are_no_message_are_the_callers_fault(method: str) -> None:
    server = Server("test")
    servicer = Inference(lambda: None)
    server.add(inference.add_InferenceServicer_to_server, servicer, "twinpool.v1.Inference")
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        name = f"/twinpool.v1.Inference/{method}"
        start: Any = channel.unary_stream if method == "Generate" else channel.unary_unary
        call = start(name, request_serializer=bytes, response_deserializer=bytes)(b"\x0a\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call.read() if method == "Generate" else call)
    await server.stop()
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.reason == "UNREADABLE_MESSAGE"
