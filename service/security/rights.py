"""Which right each method needs. A method that is not in the table is refused.

Owns the table; who has which right is `service.security.tokens`'s.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class Right(StrEnum):
    """What a token may be good for."""

    INFERENCE = "inference"
    """To ask for answers."""
    WORKER = "worker"
    """To be a part of the cluster: an instance, its ranks, or a router that calls them."""
    ADMIN = "admin"
    """To see the whole state and to take instances out."""


_INFERENCE = "/twinpool.v1.Inference"
_MEMBERSHIP = "/twinpool.v1.Membership"
_PREFILL = "/twinpool.v1.Prefill"
_DECODE = "/twinpool.v1.Decode"

RIGHTS: Mapping[str, Right] = MappingProxyType(
    {
        f"{_INFERENCE}/Generate": Right.INFERENCE,
        f"{_INFERENCE}/Describe": Right.INFERENCE,
        f"{_INFERENCE}/CountTokens": Right.INFERENCE,
        f"{_INFERENCE}/ListModels": Right.INFERENCE,
        f"{_MEMBERSHIP}/Register": Right.WORKER,
        f"{_MEMBERSHIP}/Drain": Right.ADMIN,
        f"{_MEMBERSHIP}/GetStatus": Right.ADMIN,
        f"{_PREFILL}/Run": Right.WORKER,
        f"{_PREFILL}/Abort": Right.WORKER,
        f"{_DECODE}/Reserve": Right.WORKER,
        f"{_DECODE}/Regrant": Right.WORKER,
        f"{_DECODE}/Run": Right.WORKER,
        f"{_DECODE}/Abort": Right.WORKER,
        "/twinpool.v1.Ranks/Follow": Right.WORKER,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Right.ADMIN,
    }
)

# What anybody may ask: whether a process serves says nothing of what it serves, and whoever
# watches over processes should hold no token.
OPEN = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
