"""gRPC statuses become the client's errors, with what their details say."""

import copy
import pickle
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc.error_details_pb2 import BadRequest, DebugInfo, ErrorInfo, RetryInfo
from twinpool import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    InvalidRequest,
    PermissionDenied,
    Refused,
    ServerError,
    TwinpoolError,
    Unauthenticated,
    Unavailable,
)
from twinpool.richstatus import RichStatus, read_rich_status

from tests.unit.client.fake_router import Failure, FakeRouter, part

Code = grpc.StatusCode


def info(reason: str, domain: str = "twinpool", **metadata: str) -> ErrorInfo:
    return ErrorInfo(reason=reason, domain=domain, metadata=metadata)


REFUSED = Failure(
    Code.RESOURCE_EXHAUSTED,
    "no room",
    (
        info("NO_BLOCKS", needed="40", free="7", request_id="00cd"),
        RetryInfo(retry_delay=Duration(seconds=1, nanos=250_000_000)),
    ),
)
INVALID = Failure(
    Code.INVALID_ARGUMENT,
    "sampling.top_p: found 7",
    (
        info("INVALID_REQUEST"),
        BadRequest(
            field_violations=[
                BadRequest.FieldViolation(field="sampling.top_p", description="at most 1"),
                BadRequest.FieldViolation(field="stop.stop", description="too many"),
            ]
        ),
    ),
)


def error_of(router: FakeRouter, *failures: Any) -> TwinpoolError:
    router.script = failures
    with Client(router.address) as client, pytest.raises(TwinpoolError) as caught:
        client.complete("Hi")
    return caught.value


def test_refusal_says_what_is_needed_and_when_to_try_again(router: FakeRouter) -> None:
    error = error_of(router, REFUSED)
    assert isinstance(error, Refused)
    assert (error.reason, error.needed, error.free) == ("NO_BLOCKS", 40, 7)
    assert error.retry_after_s == 1.25
    assert error.request_id == "00cd"
    assert str(error) == error.message == "no room"


def test_refusal_without_retry_never_fits(router: FakeRouter) -> None:
    failure = Failure(Code.RESOURCE_EXHAUSTED, "m", (info("NEVER_FITS", needed="9", free="3"),))
    error = error_of(router, failure)
    assert isinstance(error, Refused)
    assert error.retry_after_s is None


def test_request_beyond_the_message_size_is_refused_for_good(router: FakeRouter) -> None:
    with Client(router.address) as client, pytest.raises(Refused, match="larger than max") as e:
        client.complete("x" * (17 * 2**20))
    assert e.value.retry_after_s is None


def test_invalid_request_names_its_fields(router: FakeRouter) -> None:
    error = error_of(router, INVALID)
    assert isinstance(error, InvalidRequest)
    assert error.field == "sampling.top_p"
    assert error.violations == (("sampling.top_p", "at most 1"), ("stop.stop", "too many"))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.INVALID_ARGUMENT, InvalidRequest),
        (Code.NOT_FOUND, InvalidRequest),
        (Code.FAILED_PRECONDITION, InvalidRequest),
        (Code.OUT_OF_RANGE, InvalidRequest),
        (Code.RESOURCE_EXHAUSTED, Refused),
        (Code.UNAVAILABLE, Unavailable),
        (Code.ABORTED, Unavailable),
        (Code.CANCELLED, Unavailable),
        (Code.DEADLINE_EXCEEDED, DeadlineExceeded),
        (Code.UNAUTHENTICATED, Unauthenticated),
        (Code.PERMISSION_DENIED, PermissionDenied),
        (Code.UNIMPLEMENTED, ServerError),
        (Code.INTERNAL, ServerError),
        (Code.UNKNOWN, ServerError),
        (Code.DATA_LOSS, ServerError),
    ],
)
async def test_bare_status_becomes_the_error_of_its_code(
    router: FakeRouter, code: Code, kind: type[TwinpoolError]
) -> None:
    error = error_of(router, Failure(code, "why"))
    assert type(error) is kind
    assert error.reason == code.name
    async with AsyncClient(router.address) as client:
        with pytest.raises(kind):
            await client.complete("Hi")
        with pytest.raises(kind):
            await client.describe()


def test_unavailable_tells_the_servers_word_from_the_connections(router: FakeRouter) -> None:
    said = Failure(
        Code.UNAVAILABLE,
        "no decode instance",
        (info("NO_WORKERS"), RetryInfo(retry_delay=Duration(seconds=2))),
    )
    error = error_of(router, said)
    assert isinstance(error, Unavailable)
    assert (str(error), error.reason, error.retry_after_s) == (
        "no decode instance",
        "NO_WORKERS",
        2.0,
    )
    foreign = Failure(Code.UNAVAILABLE, "overloaded", (info("BUSY", domain="proxy"),))
    assert str(error_of(router, foreign)) == f"no answer from {router.address}: overloaded"


def test_error_in_mid_answer_knows_its_request(router: FakeRouter) -> None:
    error = error_of(router, part("Hel", 1), Failure(Code.INTERNAL, "internal error 1f"))
    assert type(error) is ServerError
    assert error.request_id == "00000000000000ab"


def test_details_of_other_kinds_are_passed_over(router: FakeRouter) -> None:
    other = (StringValue(value="x"), DebugInfo(detail="y"), *REFUSED.details)
    error = error_of(router, Failure(Code.RESOURCE_EXHAUSTED, "m", other))
    assert error.reason == "NO_BLOCKS"


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x1a\x05ab", b"not a message at all"])
def test_details_that_cannot_be_read_say_nothing(data: bytes) -> None:
    assert read_rich_status(data) == RichStatus()


def test_numbers_that_are_none_are_left_out(router: FakeRouter) -> None:
    failure = Failure(Code.RESOURCE_EXHAUSTED, "m", (info("R", needed="many"),))
    error = error_of(router, failure)
    assert isinstance(error, Refused)
    assert (error.needed, error.free) == (None, None)


def test_errors_can_be_sent_between_processes() -> None:
    error = Refused("no room", reason="R", needed=4, free=1, retry_after_s=0.5, request_id="a")
    for same in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - our own
        assert type(same) is Refused
        assert vars(same) == vars(error)
        assert str(same) == "no room"
