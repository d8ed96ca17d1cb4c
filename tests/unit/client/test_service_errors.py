"""Every error that a Twinpool service raises arrives at the client as the one that is meant."""

from typing import Any

import grpc
import pytest
import twinpool
from twinpool.errors import from_rpc_error

from service import errors as service
from service.status import rich_status


class Failed(grpc.RpcError):
    """A call that ended with a service's error, as gRPC hands it to a client."""

    def __init__(self, error: service.ServiceError) -> None:
        self._code, self._details, self._trailing = rich_status(error)

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing


def arrives(error: service.ServiceError) -> twinpool.TwinpoolError:
    return from_rpc_error(Failed(error), address="127.0.0.1:9000")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (service.InvalidRequest("stop.stop", 3, "one"), twinpool.InvalidRequest),
        (service.Refused("FULL", needed=1, free=0), twinpool.Refused),
        (service.Unavailable("no instance"), twinpool.Unavailable),
        (service.DeadlineExceeded(), twinpool.DeadlineExceeded),
        (service.NotFound("no such model"), twinpool.InvalidRequest),
        (service.Unauthenticated("no token"), twinpool.Unauthenticated),
        (service.PermissionDenied("no right"), twinpool.PermissionDenied),
        (service.Internal("a defect"), twinpool.ServerError),
        (service.WorkFailed("x", reason="PeerLost", retryable=True), twinpool.Unavailable),
        (service.WorkFailed("x", reason="BadModel", retryable=False), twinpool.ServerError),
    ],
)
def test_kind_message_and_reason_arrive(
    error: service.ServiceError, kind: type[twinpool.TwinpoolError]
) -> None:
    arrived = arrives(error)
    assert type(arrived) is kind
    assert (arrived.message, arrived.reason) == (error.message, error.reason)


def test_refusals_numbers_arrive() -> None:
    arrived = arrives(service.Refused("FULL", needed=40, free=7, retry_after_s=1.5))
    assert isinstance(arrived, twinpool.Refused)
    assert (arrived.needed, arrived.free, arrived.retry_after_s) == (40, 7, 1.5)
    never = arrives(service.Refused("NEVER_FITS", needed=40, free=7))
    assert isinstance(never, twinpool.Refused)
    assert never.retry_after_s is None


def test_invalid_field_arrives() -> None:
    arrived = arrives(service.InvalidRequest("sampling.top_p", 7, "at most 1 is allowed"))
    assert isinstance(arrived, twinpool.InvalidRequest)
    assert arrived.violations == (("sampling.top_p", "at most 1 is allowed"),)
