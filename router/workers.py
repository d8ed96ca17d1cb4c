"""Owns what the links to both kinds of instances share: time limits, the meaning of errors, where
in a prefill instance a prompt begins, and the question whether an instance answers at all.
"""

from array import array
from collections.abc import Callable, Collection
from hashlib import blake2b

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from twinpool.v1 import kv_pb2

from router.membership import Instance
from router.request import ValidRequest
from service.errors import (
    DeadlineExceeded,
    Incompatible,
    Internal,
    NotFound,
    PermissionDenied,
    ServiceError,
    Unauthenticated,
    Unavailable,
)
from service.status import from_rpc_error

CONNECT_TIMEOUT_S = 5.0
ABORT_TIMEOUT_S = 2.0

# Makes the channel to an instance at an address.
Dial = Callable[[str], grpc.aio.Channel]


def worker_error(instance: Instance, error: grpc.aio.AioRpcError) -> ServiceError:
    """Returns what a failed call to an instance means for the request that needed it."""
    meant = from_rpc_error(error)
    who = f"{instance.role.value} instance {instance.key.name!r}"
    if isinstance(meant, DeadlineExceeded):
        return Unavailable(f"{who} did not answer in time", reason="INSTANCE_TIMEOUT")
    if isinstance(meant, Unauthenticated | PermissionDenied):
        # The router's trouble: to its client it must not look as if the client's token were wrong.
        return Unavailable(f"{who} does not take this router's token", reason="ROUTER_REFUSED")
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


def cp_first(instance: Instance, request: ValidRequest) -> int:
    """Returns which of a prefill instance's cp ranks is to have a long prompt's first tokens.

    Prompts that begin alike begin at the same one, where what is cached of them lies; others are
    spread.
    """
    if instance.layout.cp == 1:
        return 0
    beginning = array("I", request.prompt_token_ids[: instance.capacity.block_size])
    salt = request.cache_salt.encode()
    digest = blake2b(len(salt).to_bytes(4, "little") + salt + beginning.tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") % instance.layout.cp


def layout_from(instance: Instance, first: int, ranks: Collection[int] = ()) -> kv_pb2.KvLayout:
    """Returns where an instance has the KV of a prompt that begins at rank `first`.

    Of `ranks` alone where any are named, the only ones then that have it.
    """
    layout = kv_pb2.KvLayout.FromString(instance.layout.wire)
    for group in (layout, *layout.more_groups):
        group.cp_first = first
        if ranks:
            shards = [shard for shard in group.shards if shard.rank in ranks]
            del group.shards[:]
            group.shards.extend(shards)
    return layout


def ttl_ms(remaining_s: float) -> int:
    return max(1, min(int(remaining_s * 1000), 2**32 - 1))
