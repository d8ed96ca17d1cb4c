"""Where a request goes when its router is lost: which address, with what, for how long.

Owns what one answer has come to and the choice among addresses. Makes no call and waits for
nothing: both clients ask here before each call and after each failed one.
"""

import dataclasses
import threading
import time
from collections.abc import Callable

import grpc
from twinpool import wire
from twinpool.errors import (
    DeadlineExceeded,
    TwinpoolError,
    Unavailable,
    from_rpc_error,
    is_lost,
)
from twinpool.types import Chunk
from twinpool.v1 import inference_pb2

# How often each router is tried where no try brings a token.
TRIES_EACH = 2
# Before a router is tried again. A killed one refuses at once, and may be back in a moment.
_FIRST_BACKOFF_S = 0.25
_LAST_BACKOFF_S = 2.0


class Routers:
    """The addresses of a client, and which of them calls go to: the same until it is lost.

    Usable from many threads.
    """

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self.addresses = addresses
        self._lock = threading.Lock()
        self._preferred = 0

    @property
    def preferred(self) -> int:
        """The index of the address that a call begins with."""
        return self._preferred

    def leave(self, index: int) -> None:
        """Let calls go elsewhere that went to this address; no matter if they do already."""
        with self._lock:
            if self._preferred == index:
                self._preferred = (index + 1) % len(self.addresses)


class Tries:
    """One call's way over the routers, with one deadline over all.

    `timeout_s` is None for no deadline. A try that was of some use begins a new row.
    """

    def __init__(
        self,
        routers: Routers,
        timeout_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._routers = routers
        self._clock = clock
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._index = routers.preferred
        self._fruitless = 0

    @property
    def index(self) -> int:
        """The index of the address that is to be called."""
        return self._index

    @property
    def address(self) -> str:
        """The address that is to be called."""
        return self._routers.addresses[self._index]

    def remaining_s(self) -> float | None:
        """Return the seconds that are left, None where there is no deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    def note_progress(self) -> None:
        """Begin a new row of tries."""
        self._fruitless = 0

    def failed(self, error: TwinpoolError, *, lost: bool) -> float:
        """Turn to the next address; return the seconds to wait before it is called.

        Raises the error where another router is of no help, and what came of all tries where that
        was the last one.
        """
        addresses = self._routers.addresses
        if not lost or len(addresses) == 1:
            raise error
        self._routers.leave(self._index)
        self._fruitless += 1
        if self._fruitless >= TRIES_EACH * len(addresses):
            raise Unavailable(
                f"no router went on with the request in {self._fruitless} tries at"
                f" {', '.join(addresses)}; the last one said: {error.message}",
                reason=error.reason,
                retry_after_s=getattr(error, "retry_after_s", None),
                request_id=error.request_id,
            ) from error
        self._index = (self._index + 1) % len(addresses)
        rounds, place = divmod(self._fruitless, len(addresses))
        wait_s = 0.0
        if rounds and not place:
            asked_for_s = getattr(error, "retry_after_s", None) or 0.0
            wait_s = min(max(_FIRST_BACKOFF_S * 2 ** (rounds - 1), asked_for_s), _LAST_BACKOFF_S)
        remaining_s = self.remaining_s()
        if remaining_s is not None and remaining_s <= wait_s:
            raise DeadlineExceeded(
                "the request took longer than its timeout_s, with its router lost on the way",
                reason="DEADLINE_EXCEEDED",
                request_id=error.request_id,
            ) from error
        return wait_s


class Answer:
    """One answer over all routers that it takes: what is asked of each, what came of it.

    Whoever reads it gets each token once: the next router is told of all that came, with the same
    id and sampling, and goes on after that.
    """

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        tries: Tries,
        trace: tuple[tuple[str, str], ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tries = tries
        # The same for all routers, as metadata.
        self.trace = trace
        self.request_id: str | None = None
        self.finished = False
        self._request = request
        self._clock = clock
        self._terms: inference_pb2.Terms | None = None
        self._token_ids: list[int] = []
        self._text_chars = 0
        self._heard_at = 0.0
        self._lost_at: float | None = None
        self._pause_s = 0.0
        self._retries = 0
        self._moves = 0

    @property
    def seed(self) -> int | None:
        """The sampler's key, where the answer is drawn and its router has told."""
        terms = self._terms
        return terms.seed if terms is not None and terms.HasField("seed") else None

    def next_request(self) -> inference_pb2.GenerateRequest:
        """Return what is to be asked of the next router."""
        if not self._token_ids or self._terms is None:
            return self._request
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.resume.request_id = self.request_id or ""
        request.resume.terms.CopyFrom(self._terms)
        request.resume.output_token_ids.extend(self._token_ids)
        request.resume.text_chars = self._text_chars
        return request

    def heard(self, message: inference_pb2.GenerateResponse) -> Chunk:
        """Take note of what came and return it as the caller gets it."""
        now = self._clock()
        if self._lost_at is not None:
            self._pause_s += now - self._lost_at
            self._lost_at = None
        self._heard_at = now
        if message.HasField("terms") and self._terms is None:
            self._terms = message.terms
        chunk = wire.chunk(message)
        self._token_ids.extend(chunk.token_ids)
        self._text_chars += len(chunk.text)
        self.request_id = chunk.request_id
        self.finished = chunk.finish_reason is not None
        if chunk.token_ids:
            self.tries.note_progress()
        return self._with_whole_stats(chunk)

    def failed(self, error: grpc.RpcError) -> float:
        """Return the seconds to wait before another router is asked; `next_request` says what.

        Raises the TwinpoolError that the caller gets where there is no other.
        """
        meant = from_rpc_error(error, address=self.tries.address, request_id=self.request_id)
        return self.lost(meant, is_lost(error))

    def lost(self, error: TwinpoolError, is_lost: bool = True) -> float:
        """As `failed`, for an error that is one of ours."""
        # An answer that has begun at a router of an older version has nothing to be gone on with.
        can_go_on = self._terms is not None or not self._token_ids
        wait_s = self.tries.failed(error, lost=is_lost and can_go_on and not self.finished)
        if self._token_ids and self._lost_at is None:
            self._lost_at = self._heard_at
            self._moves += 1
        else:
            self._retries += 1
        return wait_s

    def _with_whole_stats(self, chunk: Chunk) -> Chunk:
        """Add to the last router's stats what no router knows: how the answer came to it."""
        if chunk.stats is None or not (self._moves or self._retries):
            return chunk
        stats = dataclasses.replace(
            chunk.stats,
            retries=chunk.stats.retries + self._retries,
            moves=chunk.stats.moves + self._moves,
            pause_s=chunk.stats.pause_s + self._pause_s,
        )
        return dataclasses.replace(chunk, stats=stats)
