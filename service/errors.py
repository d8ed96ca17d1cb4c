"""The errors a Twinpool service answers with, as types.

Owns what went wrong and what to do about it; how an error looks on the wire is `service.status`.
Messages are shown to clients: they never hold prompts, tokens, paths or secrets.
"""


class StartError(Exception):
    """The process cannot start or go on; the message says why and what to do about it."""


class ServiceError(Exception):
    """Base of every error that a servicer may raise to end a call."""

    # Seconds after which trying again can help; None where nothing is known of that.
    retry_after_s: float | None = None

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later or elsewhere."""
        return False


class InvalidRequest(ServiceError):
    """A field of the request is not acceptable."""

    def __init__(
        self, field: str, found: object, hint: str, *, reason: str = "INVALID_REQUEST"
    ) -> None:
        self.field = field
        self.found = str(found)[:100]
        self.hint = hint
        super().__init__(f"{field}: found {self.found}; {hint}", reason=reason)


class Refused(ServiceError):
    """The system has no room; without `retry_after_s` the request can never fit."""

    def __init__(
        self,
        reason: str,
        *,
        needed: int,
        free: int,
        retry_after_s: float | None = None,
        message: str = "",
    ) -> None:
        self.needed = needed
        self.free = free
        self.retry_after_s = retry_after_s
        if not message:
            what_next = (
                "it can never fit: ask for fewer tokens"
                if retry_after_s is None
                else f"try again in {retry_after_s:.1f} s"
            )
            message = f"no room for the request: needs {needed}, free {free}; {what_next}"
        super().__init__(message, reason=reason)

    @property
    def retryable(self) -> bool:
        return self.retry_after_s is not None


class Unavailable(ServiceError):
    """What the call needs is not there now: no worker, a lost peer, a server that is stopping."""

    def __init__(
        self, message: str, *, reason: str = "UNAVAILABLE", retry_after_s: float | None = None
    ) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message, reason=reason)

    @property
    def retryable(self) -> bool:
        return True


class WorkFailed(ServiceError):
    """An instance failed at one request's work; `reason` names the engine or transfer error."""

    def __init__(self, message: str, *, reason: str, retryable: bool) -> None:
        self._retryable = retryable
        super().__init__(message, reason=reason)

    @property
    def retryable(self) -> bool:
        return self._retryable


class DeadlineExceeded(ServiceError):
    """The request's time is over."""

    def __init__(
        self,
        message: str = "the request's deadline has passed",
        *,
        reason: str = "DEADLINE_EXCEEDED",
    ) -> None:
        super().__init__(message, reason=reason)


class NotFound(ServiceError):
    """The named model, instance or request is not known here."""

    def __init__(self, message: str, *, reason: str = "NOT_FOUND") -> None:
        super().__init__(message, reason=reason)


class Incompatible(ServiceError):
    """The caller does not fit what is served here: another model, dtype, layout or epoch."""

    def __init__(self, message: str, *, reason: str = "INCOMPATIBLE") -> None:
        super().__init__(message, reason=reason)


class Unauthenticated(ServiceError):
    """The caller showed no credentials, or ones that are not accepted."""

    def __init__(self, message: str, *, reason: str = "UNAUTHENTICATED") -> None:
        super().__init__(message, reason=reason)


class PermissionDenied(ServiceError):
    """The caller is known, and may not do this."""

    def __init__(self, message: str, *, reason: str = "PERMISSION_DENIED") -> None:
        super().__init__(message, reason=reason)


class Internal(ServiceError):
    """A defect on the server's side; the log there has the details under the id in the message."""

    def __init__(self, message: str, *, reason: str = "INTERNAL") -> None:
        super().__init__(message, reason=reason)
