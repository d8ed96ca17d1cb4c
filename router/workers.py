"""Owns what the links to both kinds of instances share: time limits, the meaning of errors, and
the question whether an instance answers at all.
"""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router.membership import Instance
from service.errors import (
    DeadlineExceeded,
    Incompatible,
    Internal,
    NotFound,
    ServiceError,
    Unavailable,
)
from service.status import from_rpc_error

CONNECT_TIMEOUT_S = 5.0
ABORT_TIMEOUT_S = 2.0


def worker_error(instance: Instance, error: grpc.aio.AioRpcError) -> ServiceError:
    """Returns what a failed call to an instance means for the request that needed it."""
    meant = from_rpc_error(error)
    who = f"{instance.role.value} instance {instance.key.name!r}"
    if isinstance(meant, DeadlineExceeded):
        return Unavailable(f"{who} did not answer in time", reason="INSTANCE_TIMEOUT")
    # An instance that has restarted, or has not heard of a peer yet, refuses what it will take
    # a moment later.
    passing = isinstance(meant, Incompatible | NotFound) or _is_broken_stream(meant)
    if passing or isinstance(meant, Unavailable):
        return Unavailable(f"{who}: {meant.message}", reason=meant.reason)
    return meant


def _is_broken_stream(error: ServiceError) -> bool:
    """Whether gRPC itself made this error up where the instance's own words are lost.

    UNKNOWN stands for a stream that broke in an unusual way. The message is what grpc.aio puts in
    the place of a stream's real status where a write comes after it (grpc/grpc#36066).
    """
    return isinstance(error, Internal) and (
        error.reason == "UNKNOWN" or error.message == "Internal error from Core"
    )


async def answers(channel: grpc.aio.Channel) -> bool:
    """Returns whether an instance answers on its channel within `CONNECT_TIMEOUT_S`."""
    health = health_pb2_grpc.HealthStub(channel)
    try:
        await health.Check(
            health_pb2.HealthCheckRequest(), timeout=CONNECT_TIMEOUT_S, wait_for_ready=True
        )
    except grpc.aio.AioRpcError:
        return False
    return True


def ttl_ms(remaining_s: float) -> int:
    return max(1, min(int(remaining_s * 1000), 2**32 - 1))
