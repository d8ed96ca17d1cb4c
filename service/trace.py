"""Which trace a call belongs to, as W3C Trace Context writes it: taken from the caller, passed on.

Owns the two headers and the trace of the call under way. Collects and exports nothing: other tools
join logs and calls by the id.
"""

import re
import secrets
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc

Metadata = Iterable[tuple[str, str | bytes]]

_PARENT = "traceparent"
_STATE = "tracestate"
# W3C Trace Context, section 3.2: version, trace id, parent id, flags. Later versions may say more.
_PARENT_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_VERSION = "ff"
_FIRST_VERSION = "00"
# What must be passed on at least (section 3.3.1.5); a longer one is left out as a whole.
_MOST_STATE_CHARS = 512
_STATE_FORM = re.compile(r"[\x20-\x7e]*")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A call's place in a trace: `trace_id` (32 hex digits) is the whole's, `span_id` (16) ours."""

    trace_id: str
    span_id: str
    flags: str = "00"
    state: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with a call that this one makes."""
        parent = (_PARENT, f"{_FIRST_VERSION}-{self.trace_id}-{self.span_id}-{self.flags}")
        return (parent, (_STATE, self.state)) if self.state else (parent,)


_trace: ContextVar[Trace | None] = ContextVar("trace", default=None)


def current_trace() -> Trace | None:
    """Returns the trace of the call under way; None where there is none."""
    return _trace.get()


def current_trace_id() -> str:
    """Returns the id of that trace, empty where there is none."""
    trace = _trace.get()
    return trace.trace_id if trace is not None else ""


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Returns what a call carries that is made for the one under way."""
    trace = _trace.get()
    return trace.metadata if trace is not None else ()


def begin_trace() -> Trace:
    """Returns the trace of the call under way, a new one where its caller has sent none."""
    trace = _trace.get()
    if trace is None:
        trace = Trace(trace_id=_random_id(16), span_id=_random_id(8))
        _trace.set(trace)
    return trace


def read_trace(metadata: Metadata) -> Trace | None:
    """Returns a caller's trace with a span of our own; None where it sent none, or no valid one."""
    parents = [value for key, value in metadata if key == _PARENT]
    if len(parents) != 1 or not isinstance(parents[0], str):
        return None
    found = _PARENT_FORM.fullmatch(parents[0].strip())
    if found is None:
        return None
    version, trace_id, parent_id, flags, more = found.groups()
    is_valid = version != _NO_VERSION and int(trace_id, 16) and int(parent_id, 16)
    if not is_valid or (version == _FIRST_VERSION and more):
        return None
    states = [value for key, value in metadata if key == _STATE]
    state = ",".join(value for value in states if isinstance(value, str))
    if len(state) > _MOST_STATE_CHARS or not _STATE_FORM.fullmatch(state):
        state = ""
    # Of the flags, "sampled" is the only one there is to pass on.
    sampled = int(flags, 16) & 1
    return Trace(
        trace_id=trace_id, span_id=_random_id(8), flags=f"{sampled:02x}", state=state.strip()
    )


def _random_id(size: int) -> str:
    """Returns so many random bytes in hex, which are never all 0."""
    while not any(drawn := secrets.token_bytes(size)):
        pass
    return drawn.hex()


class TraceInterceptor(grpc.aio.ServerInterceptor):
    """Makes a caller's trace that of the call under way, for its logs and the calls it makes."""

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        # Each call has a task of its own, and with it a context of its own.
        _trace.set(read_trace(handler_call_details.invocation_metadata or ()))
        return await continuation(handler_call_details)
