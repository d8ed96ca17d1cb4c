"""Who may call what: the decision for each call, and the interceptor that enforces it.

Owns what is asked of a call before any of its messages is read. Denies by default.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from typing import Any

import grpc

from service.errors import PermissionDenied, ServiceError, Unauthenticated
from service.security.rights import OPEN, RIGHTS, Right
from service.security.tokens import Caller, TokenFile, WorkerToken

_log = logging.getLogger(__name__)

_HEADER = "authorization"
_SCHEME = "bearer"

_AT_ROUTER = Caller(name="worker", tenant="", rights=frozenset({Right.WORKER}))
_AT_INSTANCE = Caller(name="worker", tenant="", rights=frozenset({Right.WORKER, Right.ADMIN}))

_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current_caller() -> Caller | None:
    """Returns whose token the call under way has shown; None where none was asked for."""
    return _caller.get()


class Access:
    """Decides about calls. With a file of tokens, or at an instance, every right is guarded.

    A router that has only the workers' token guards the right `worker`, and is open to clients.
    The workers' token gives that right, and at an instance, which knows no other, `admin`.
    """

    def __init__(
        self,
        *,
        tokens: TokenFile | None = None,
        worker: WorkerToken | None = None,
        is_router: bool = False,
    ) -> None:
        self._tokens = tokens
        self._worker = worker
        self._guarded = frozenset(Right if tokens or not is_router else {Right.WORKER})
        self._worker_caller = _AT_ROUTER if is_router else _AT_INSTANCE

    @property
    def is_complete(self) -> bool:
        """Whether every right is guarded."""
        return self._guarded == frozenset(Right)

    def authorize(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Caller | None:
        """Returns who may call a method; None for one that asks for no token.

        Raises Unauthenticated without a token or with an unknown one, PermissionDenied where the
        token has not the right, or where nobody has it.
        """
        if method in OPEN:
            return None
        needed = RIGHTS.get(method)
        if needed is not None and needed not in self._guarded:
            return None
        caller = self._identify(_bearer(metadata))
        if needed is None:
            raise PermissionDenied("nobody may call this method here", reason="METHOD_NOT_LISTED")
        if needed not in caller.rights:
            raise PermissionDenied(
                f"this call needs the right '{needed}', which the token has not: use another token",
                reason="RIGHT_MISSING",
            )
        return caller

    def _identify(self, token: str) -> Caller:
        if self._worker is not None and self._worker.accepts(token):
            return self._worker_caller
        caller = self._tokens.find(token) if self._tokens is not None else None
        if caller is None:
            raise Unauthenticated(
                "the token is not known here: it may be for another cluster, or out of use",
                reason="TOKEN_UNKNOWN",
            )
        return caller


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Returns the token that a call shows; raises Unauthenticated where it is not exactly one."""
    shown = [value for key, value in metadata if key == _HEADER]
    if not shown:
        raise Unauthenticated(
            "this call needs a token: send it as 'authorization: Bearer ...' (--token-file)",
            reason="TOKEN_MISSING",
        )
    scheme, _, token = str(shown[0]).partition(" ")
    if len(shown) > 1 or scheme.lower() != _SCHEME or not token.strip():
        raise Unauthenticated(
            "the authorization must be 'Bearer' and one token", reason="TOKEN_MALFORMED"
        )
    return token.strip()


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Lets through what `Access` allows, unary and streaming alike.

    It comes after `service.status.StatusInterceptor`, which makes statuses of its errors.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        details = handler_call_details
        try:
            caller = self._access.authorize(details.method, details.invocation_metadata or ())
        except (Unauthenticated, PermissionDenied) as exc:
            _log.debug("a call of %.100r is refused: %s", details.method, exc.reason)
            return _refusal(exc)
        # Each call has a task of its own, and with it a context of its own.
        _caller.set(caller)
        return await continuation(details)


def _refusal(error: ServiceError) -> Any:
    # A handler of streams fits calls of every kind, and reads nothing that the caller has sent.
    async def refuse(request: Any, context: Any) -> None:
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse)
