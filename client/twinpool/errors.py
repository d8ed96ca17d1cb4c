"""The errors that calls raise, and the one place where a gRPC status becomes one of them."""

from typing import Any

import grpc
from twinpool.richstatus import RichStatus, read_rich_status

_DETAILS_KEY = "grpc-status-details-bin"


class TwinpoolError(Exception):
    """Base of every error of the service.

    `reason` is a constant for programs, as NEVER_FITS; `request_id` names the request
    in the servers' logs where it is known.
    """

    def __init__(self, message: str, *, reason: str = "", request_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.request_id = request_id


class Refused(TwinpoolError):
    """There is no room for the request.

    `needed` and `free` are in the unit that the message names. `retry_after_s` is when trying
    again can help; without it the request can never fit.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        needed: int | None = None,
        free: int | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, reason=reason, request_id=request_id)
        self.needed = needed
        self.free = free
        self.retry_after_s = retry_after_s


class Unavailable(TwinpoolError):
    """The server cannot be reached, is stopping, or has no worker; the same call may work later."""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        retry_after_s: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, reason=reason, request_id=request_id)
        self.retry_after_s = retry_after_s


class InvalidRequest(TwinpoolError):
    """The request asks for what cannot be done; `field` names what to change, where one does.

    `violations` are (field, description) pairs.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        violations: tuple[tuple[str, str], ...] = (),
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, reason=reason, request_id=request_id)
        self.violations = violations

    @property
    def field(self) -> str:
        """The first field that is wrong, by its path in the request; empty where none is named."""
        return self.violations[0][0] if self.violations else ""


class DeadlineExceeded(TwinpoolError):
    """The call took longer than its timeout_s."""


class Unauthenticated(TwinpoolError):
    """The server wants a token, or another one."""


class PermissionDenied(TwinpoolError):
    """The token is known, and is not good for this call."""


class ServerError(TwinpoolError):
    """The server failed at this request; nothing about the request is known to be wrong."""


def from_rpc_error(
    error: grpc.RpcError, *, address: str, request_id: str | None = None
) -> TwinpoolError:
    """Return the error that a failed call to `address` stands for."""
    code = error.code()
    said = error.details() or code.name
    rich = _rich_status(error)
    reason = rich.reason or code.name
    request_id = request_id or rich.metadata.get("request_id")
    match code:
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Refused(
                said,
                reason=reason,
                needed=_number(rich.metadata.get("needed")),
                free=_number(rich.metadata.get("free")),
                retry_after_s=rich.retry_after_s,
                request_id=request_id,
            )
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.ABORTED | grpc.StatusCode.CANCELLED:
            # Only the server itself can say more than that the call did not get through.
            message = said if rich.ours else f"no answer from {address}: {said}"
            return Unavailable(
                message, reason=reason, retry_after_s=rich.retry_after_s, request_id=request_id
            )
        case (
            grpc.StatusCode.INVALID_ARGUMENT
            | grpc.StatusCode.OUT_OF_RANGE
            | grpc.StatusCode.NOT_FOUND
            | grpc.StatusCode.FAILED_PRECONDITION
        ):
            return InvalidRequest(
                said, reason=reason, violations=rich.violations, request_id=request_id
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            # gRPC's own words for it do not say what has passed.
            message = said if rich.ours else f"the call to {address} took longer than its timeout_s"
            return DeadlineExceeded(message, reason=reason, request_id=request_id)
        case grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated(said, reason=reason, request_id=request_id)
        case grpc.StatusCode.PERMISSION_DENIED:
            return PermissionDenied(said, reason=reason, request_id=request_id)
        case grpc.StatusCode.UNIMPLEMENTED:
            message = f"{address} does not offer this call ({said}); is it a Twinpool router?"
            return ServerError(message, reason=reason, request_id=request_id)
        case _:
            return ServerError(said, reason=reason, request_id=request_id)


_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
# What gRPC itself makes of a connection that broke in an unusual way.
_BROKEN = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)


def is_lost(error: grpc.RpcError) -> bool:
    """Tell whether another router may do what this one did not: it is gone, or has no workers."""
    return error.code() in _LOST or (error.code() in _BROKEN and not _rich_status(error).ours)


def _rich_status(error: grpc.RpcError) -> RichStatus:
    trailing: Any = error.trailing_metadata()  # the stubs get its type wrong
    for key, value in trailing or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            return read_rich_status(value)
    return RichStatus()


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
