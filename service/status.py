"""Between `service.errors` and gRPC statuses, both ways: the only file that names status codes.

On the wire an error is a google.rpc.Status with ErrorInfo (reason, domain "twinpool", metadata),
BadRequest for a field that is wrong, RetryInfo where trying again can help. The trailing metadata
`grpc-retry-pushback-ms` tells the same to clients that leave it to gRPC to try again.
"""

import asyncio
import logging
import secrets
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from inspect import isasyncgenfunction
from typing import Any, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

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

DOMAIN = "twinpool"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
# To gRPC's own retries any number below 0 says that there is to be none.
_NO_RETRY = "-1"
_DETAILS_KEY = "grpc-status-details-bin"
# The message travels twice in the trailers, which HTTP/2 peers cap at 8 KiB by default.
_MAX_MESSAGE_CHARS = 1000

_log = logging.getLogger(__name__)

_CODES: dict[type[ServiceError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Refused: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Incompatible: grpc.StatusCode.FAILED_PRECONDITION,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    Internal: grpc.StatusCode.INTERNAL,
}


# ---- error -> wire


def rich_status(
    error: ServiceError,
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]:
    """Returns the status code, the message and the trailing metadata that stand for an error."""
    code = _code_of(error)
    message = error.message[:_MAX_MESSAGE_CHARS]
    status = Status(code=code.value[0], message=message)
    for detail in _details(error):
        status.details.add().Pack(detail)
    trailing: list[tuple[str, str | bytes]] = [(_DETAILS_KEY, status.SerializeToString())]
    if error.retry_after_s is not None:
        trailing.append((PUSHBACK_KEY, str(round(error.retry_after_s * 1000))))
    elif not error.retryable:
        trailing.append((PUSHBACK_KEY, _NO_RETRY))
    return code, message, tuple(trailing)


def _code_of(error: ServiceError) -> grpc.StatusCode:
    if isinstance(error, WorkFailed):
        if error.reason == DeadlineExceeded.__name__:
            return grpc.StatusCode.DEADLINE_EXCEEDED
        if error.reason == "Aborted":  # by who asked for it
            return grpc.StatusCode.CANCELLED
        return grpc.StatusCode.ABORTED if error.retryable else grpc.StatusCode.INTERNAL
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def _details(error: ServiceError) -> list[Message]:
    info = ErrorInfo(reason=error.reason, domain=DOMAIN)
    details: list[Message] = [info]
    if isinstance(error, InvalidRequest):
        info.metadata["field"] = error.field
        info.metadata["found"] = error.found
        bad = BadRequest()
        bad.field_violations.add(field=error.field, description=error.hint, reason=error.reason)
        details.append(bad)
    if isinstance(error, Refused):
        info.metadata["needed"] = str(error.needed)
        info.metadata["free"] = str(error.free)
    if isinstance(error, WorkFailed):
        info.metadata["retryable"] = "true" if error.retryable else "false"
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(RetryInfo(retry_delay=delay))
    return details


def as_service_error(exc: BaseException, where: str) -> ServiceError:
    """Returns the error to answer with; a defect is logged and becomes `Internal` with its id.

    A group whose leaves are all service errors, as a TaskGroup raises it, counts as its first
    leaf. The trace is logged without exception messages, since those may quote a request's
    content; level debug logs them too.
    """
    causes = [cause for cause in leaves(exc) if isinstance(cause, ServiceError)]
    if len(causes) == len(leaves(exc)):
        return causes[0]
    error_id = secrets.token_hex(4)
    _log.error("internal error %s in %s\n%s", error_id, where, quiet_trace(exc))
    _log.debug("internal error %s says: %s", error_id, exc)
    return Internal(f"internal error {error_id}; the server's log has the details")


def leaves(exc: BaseException) -> list[BaseException]:
    """Returns the errors within a group, however nested; of any other error itself."""
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for inner in exc.exceptions for leaf in leaves(inner)]
    return [exc]


def quiet_trace(exc: BaseException, _shown: frozenset[int] = frozenset()) -> str:
    """Formats where an exception came from: types and frames, no messages and no values."""
    parts = []
    shown = _shown | {id(exc)}
    cause, context = exc.__cause__, exc.__context__
    if cause is not None and id(cause) not in shown:
        parts.append(quiet_trace(cause, shown) + "caused:\n")
    elif context is not None and id(context) not in shown and not exc.__suppress_context__:
        parts.append(quiet_trace(context, shown) + "while handling it:\n")
    parts.append("".join(traceback.format_tb(exc.__traceback__)))
    parts.append(f"{type(exc).__qualname__}\n")
    if isinstance(exc, BaseExceptionGroup):
        parts.extend(f"within the group:\n{quiet_trace(inner, shown)}" for inner in exc.exceptions)
    return "".join(parts)


async def abort_with(context: Any, error: ServiceError) -> None:
    """Ends a grpc.aio call with an error's rich status; always raises, as context.abort does."""
    code, message, trailing = rich_status(error)
    try:
        await context.abort(code, message, trailing)
    finally:
        # gRPC's call keeps what abort raises, which keeps this frame: nothing here may keep the
        # call, or each refusal is garbage that only the collector finds.
        del context, error


def _forget_frames(exc: BaseException | None) -> None:
    """Lets go of the frames that an error went through, and of all that they hold; see above."""
    seen = set()  # one that is raised again may come to be a cause of itself
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        exc.__traceback__ = None
        exc = exc.__cause__ or exc.__context__


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Lets servicers raise: turns `ServiceError` into its status and defects into INTERNAL.

    Bytes that are no message are the caller's fault, which gRPC itself would call UNKNOWN.
    Cancellation and `context.abort` pass through. `service.lifecycle.Server` installs it.
    """

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = _handler_kind(handler)
        inner = getattr(handler, kind)
        guard = _guard_stream if isasyncgenfunction(inner) else _guard_call
        readable = _readable_stream if handler.request_streaming else _readable
        guarded = guard(inner, handler_call_details.method, readable)
        read = _reader(handler.request_deserializer)
        return handler._replace(request_deserializer=read, **{kind: guarded})


# Stands for bytes that are no message until the call can be ended with an error.
_UNREADABLE = object()


def _reader(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def read(content: bytes) -> Any:
        try:
            return deserialize(content)
        except DecodeError:
            return _UNREADABLE

    return read


def _readable(request: Any) -> Any:
    if request is _UNREADABLE:
        raise InvalidRequest(
            "request",
            "bytes that are no message of this method",
            "send what this version's proto files say",
            reason="UNREADABLE_MESSAGE",
        )
    return request


async def _readable_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _readable(request)


def _handler_kind(handler: Any) -> str:
    sent = "stream" if handler.request_streaming else "unary"
    returned = "stream" if handler.response_streaming else "unary"
    return f"{sent}_{returned}"


def _guard_call(
    inner: Callable[[Any, Any], Awaitable[Any]], method: str, readable: Callable[[Any], Any]
) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await inner(readable(request), context)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as exc:
            error = as_service_error(exc, method)
            _forget_frames(exc)
            await abort_with(context, error)
        finally:
            del request, context

    return guarded


def _guard_stream(
    inner: Callable[[Any, Any], Any], method: str, readable: Callable[[Any], Any]
) -> Any:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async with aclosing(inner(readable(request), context)) as messages:
                async for message in messages:
                    yield message
        except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as exc:
            await abort_with(context, as_service_error(exc, method))

    return guarded


# ---- wire -> error


def from_rpc_error(error: grpc.aio.AioRpcError) -> ServiceError:
    """Returns the service error that a failed call stands for, for a process that is a client.

    Works from the rich status where there is one, else from the bare code.
    """
    code = error.code()
    message = error.details() or code.name
    info, bad, retry = _unpack(error)
    reason = info.reason if info is not None and info.domain == DOMAIN else ""
    metadata = dict(info.metadata) if info is not None else {}
    retry_after_s = retry.retry_delay.ToMilliseconds() / 1000 if retry is not None else None
    if "retryable" in metadata:
        return WorkFailed(message, reason=reason, retryable=metadata["retryable"] == "true")
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.OUT_OF_RANGE:
            return _invalid_request(message, reason or "INVALID_REQUEST", metadata, bad)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Refused(
                reason or "RESOURCE_EXHAUSTED",
                needed=int(metadata.get("needed", 0)),
                free=int(metadata.get("free", 0)),
                retry_after_s=retry_after_s,
                message=message,
            )
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(message, reason=reason or "UNAVAILABLE", retry_after_s=retry_after_s)
        case grpc.StatusCode.CANCELLED | grpc.StatusCode.ABORTED:
            # A server that stops ends its calls so; the same work may be done elsewhere.
            return Unavailable(message, reason=reason or code.name)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(message, reason=reason or "DEADLINE_EXCEEDED")
        case grpc.StatusCode.NOT_FOUND:
            return NotFound(message, reason=reason or "NOT_FOUND")
        case grpc.StatusCode.FAILED_PRECONDITION:
            return Incompatible(message, reason=reason or "INCOMPATIBLE")
        case grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated(message, reason=reason or "UNAUTHENTICATED")
        case grpc.StatusCode.PERMISSION_DENIED:
            return PermissionDenied(message, reason=reason or "PERMISSION_DENIED")
        case _:
            return Internal(message, reason=reason or code.name)


def _invalid_request(
    message: str, reason: str, metadata: dict[str, str], bad: BadRequest | None
) -> InvalidRequest:
    violation = bad.field_violations[0] if bad is not None and bad.field_violations else None
    if violation is None:
        return InvalidRequest("request", "an unacceptable value", message, reason=reason)
    found = metadata.get("found", "")
    return InvalidRequest(violation.field, found, violation.description, reason=reason)


def _unpack(
    error: grpc.aio.AioRpcError,
) -> tuple[ErrorInfo | None, BadRequest | None, RetryInfo | None]:
    info, bad, retry = None, None, None
    try:
        status = rpc_status.from_call(cast(grpc.Call, error))
    except (ValueError, DecodeError):
        # Details that contradict the call's own code are not ours: a proxy's, say.
        status = None
    for packed in status.details if status is not None else ():
        for kind in (ErrorInfo, BadRequest, RetryInfo):
            detail = kind()
            if packed.Is(kind.DESCRIPTOR) and packed.Unpack(detail):
                match detail:
                    case ErrorInfo():
                        info = detail
                    case BadRequest():
                        bad = detail
                    case RetryInfo():
                        retry = detail
    return info, bad, retry
