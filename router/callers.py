"""What a caller's token makes of its requests: whose they are, how much they may ask for.

Owns the number of requests that each token has open. Where no tokens are asked for, all is as the
client says.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from router.request import ValidRequest
from router.validate import Caps
from service.errors import Refused
from service.security.tokens import Caller

_RETRY_AFTER_S = 1.0


class Callers:
    """Counts the open requests of each token, by the token's name."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    @contextmanager
    def admitted(self, caller: Caller | None) -> Iterator[None]:
        """Holds one of the caller's places; raises Refused where all are taken."""
        if caller is None:
            yield
            return
        allowed = caller.max_concurrent_requests
        if allowed is not None and self._open[caller.name] >= allowed:
            raise Refused(
                "TOO_MANY_REQUESTS",
                needed=1,
                free=0,
                retry_after_s=_RETRY_AFTER_S,
                message=f"the token has its {allowed} requests open: wait for one of them to end",
            )
        self._open[caller.name] += 1
        try:
            yield
        finally:
            self._open[caller.name] -= 1
            if not self._open[caller.name]:
                del self._open[caller.name]


def caps_of(caller: Caller | None, caps: Caps) -> Caps:
    """Returns what a caller may ask for: the router's limits, or its token's where less."""
    if caller is None or caller.max_new_tokens is None:
        return caps
    return replace(
        caps,
        max_new_tokens=min(caps.max_new_tokens, caller.max_new_tokens),
        default_max_new_tokens=min(caps.default_max_new_tokens, caller.max_new_tokens),
    )


def standing(caller: Caller | None, tenant: str, priority: int) -> tuple[str, int]:
    """Returns for whom a request counts and its priority; given is what it says of itself."""
    if caller is None:
        return tenant, priority
    if caller.max_priority is not None:
        priority = min(priority, caller.max_priority)
    return caller.tenant, priority


def owned_by(caller: Caller | None, request: ValidRequest) -> ValidRequest:
    """Returns a request as the caller's: its tenant, its priority at most, its own cached prompts.

    A prompt that is found in the cache is answered sooner, and the stats say so: with a salt of
    their own, tenants cannot find out each other's prompts.
    """
    if caller is None:
        return request
    tenant, priority = standing(caller, request.tenant, request.priority)
    salt = hashlib.sha256(f"{caller.tenant}\0{request.cache_salt}".encode()).hexdigest()
    return replace(request, tenant=tenant, priority=priority, cache_salt=salt)
