"""Owns one try of one request at the pools: reserve and prefill side by side, then decode's tokens.

Whatever way a try ends, it gives back what it holds, exactly once, in background work that a
cancelled request does not take down with it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from router.admission import Admission
from router.decode_link import DecodeLink
from router.events import (
    DecodeFailed,
    Event,
    FirstToken,
    Granted,
    Output,
    PrefillEnded,
    Transferred,
)
from router.ledger import InstanceKey, Placement
from router.pools import Pools
from router.prefill_link import PrefillCall, PrefillLink
from router.request import Stats, Tokens, ValidRequest
from router.tasks import Tasks
from service.errors import Refused, ServiceError, Unavailable

# Decode knows within this time whether a transfer whose sender died was complete.
HANDOFF_GRACE_S = 1.0
# The end of the transfer is told on another stream than the tokens it made possible.
STATS_GRACE_S = 0.2
# How long decode may lack room that the ledger says it has, as after an abort.
RESERVE_PATIENCE_S = 10.0
_FIRST_RESERVE_BACKOFF_S = 0.02
_LAST_RESERVE_BACKOFF_S = 0.5
_ABORT_TRIES = 3

_log = logging.getLogger(__name__)


class Attempt:
    """One try: `start`, then `next_tokens` until its end, and `close` once at any point.

    The request id is this try's own, so that a late abort of one try cannot hit the next.
    """

    def __init__(
        self,
        request_id: int,
        request: ValidRequest,
        placement: Placement,
        *,
        pools: Pools,
        admission: Admission,
        tasks: Tasks,
        stats: Stats,
        deadline: float,
        clock: Callable[[], float],
    ) -> None:
        self._id = request_id
        self._request = request
        self._placement = placement
        self._pools = pools
        self._admission = admission
        self._tasks = tasks
        self._stats = stats
        self._deadline = deadline
        self._clock = clock
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._prefill: PrefillLink | None = None
        self._decode: DecodeLink | None = None
        self._call: PrefillCall | None = None
        self._reserving: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._first: Tokens | None = None
        self._is_granted = False
        self._has_output = False
        self._is_transferred = False
        self._is_finished = False
        self._give_up_at: float | None = None
        self.suspect: InstanceKey | None = None

    async def next_tokens(self) -> Tokens:
        """Returns what was generated next; the last of it has `finish` set.

        Raises ServiceError; `suspect` then names the instance that failed.
        """
        while True:
            tokens = self._take(await self._next_event())
            if tokens is None:
                continue
            if tokens.finish is not None:
                self._is_finished = True
                await self._await_transferred()
            return tokens

    # ---- beginning

    def start(self) -> None:
        """Asks prefill for the work and decode for the room at the same time.

        Raises Unavailable where either has gone since it was chosen.
        """
        prefill_key, decode_key = self._placement.prefill, self._placement.decode
        self._stats.prefill_instance = prefill_key.name
        self._stats.decode_instance = decode_key.name if decode_key is not None else ""
        self.suspect = prefill_key
        self._prefill = self._pools.prefill(prefill_key)
        if decode_key is not None:
            self.suspect = decode_key
            self._decode = self._pools.decode(decode_key)
            self._decode.attach(self._id, self._inbox.put_nowait)
            self._reserving = asyncio.create_task(self._reserve(self._decode, self._prefill))
        self.suspect = None
        self._call = self._prefill.run(
            self._id,
            self._request,
            transfer=decode_key is not None,
            remaining_s=self._remaining_s(),
            inbox=self._inbox.put_nowait,
        )

    async def _reserve(self, decode: DecodeLink, prefill: PrefillLink) -> None:
        """Posts the outcome of the reservation. Never cancelled while a call is under way.

        An abort that overtakes a reservation would leave it behind for ever.
        """
        backoff_s = _FIRST_RESERVE_BACKOFF_S
        patience_ends = self._clock() + RESERVE_PATIENCE_S
        while not self._closing.is_set():
            try:
                grant = await decode.reserve(
                    self._id, self._request, prefill.instance, self._remaining_s()
                )
            except ServiceError as exc:
                if not _is_passing(exc) or self._clock() >= patience_ends:
                    self._inbox.put_nowait(DecodeFailed(_as_unavailable(exc)))
                    return
            else:
                self._inbox.put_nowait(Granted(grant))
                return
            try:
                async with asyncio.timeout(backoff_s):
                    await self._closing.wait()
            except TimeoutError:
                backoff_s = min(2 * backoff_s, _LAST_RESERVE_BACKOFF_S)

    # ---- what happens

    async def _next_event(self) -> Event:
        if self._give_up_at is None:
            return await self._inbox.get()
        try:
            async with asyncio.timeout(self._give_up_at - self._clock()):
                return await self._inbox.get()
        except TimeoutError:
            self.suspect = self._placement.prefill
            raise Unavailable(
                f"prefill instance {self._placement.prefill.name!r} was lost while it sent the KV",
                reason="INSTANCE_LOST",
            ) from None

    def _take(self, event: Event) -> Tokens | None:
        """Takes note of an event; returns the tokens it brings, if any. Raises ServiceError."""
        match event:
            case FirstToken():
                return self._take_first_token(event)
            case Granted(grant):
                self._is_granted = True
                assert self._call is not None
                self._call.send_grant(grant)
                self._activate()
            case Output(tokens):
                self._has_output = True
                self._give_up_at = None
                return tokens
            case Transferred():
                self._take_transferred(event)
            case PrefillEnded(error):
                self._take_prefill_ended(error)
            case DecodeFailed(error):
                self.suspect = self._placement.decode
                raise error
        return None

    def _take_first_token(self, event: FirstToken) -> Tokens:
        self._admission.end_prefill(self._id)
        self._stats.queue_s += event.queue_s
        self._stats.prefill_s = event.prefill_s
        self._first = event.tokens
        if event.tokens.finish is None:
            self._activate()
        return event.tokens

    def _activate(self) -> None:
        if self._is_granted and self._first is not None:
            assert self._decode is not None
            self._decode.activate(self._id, self._first.token_ids[0])

    def _take_transferred(self, event: Transferred) -> None:
        self._is_transferred = True
        self._stats.kv_bytes = event.kv_bytes
        self._stats.kv_transport = event.transport
        self._stats.handoff_s = event.handoff_s

    def _take_prefill_ended(self, error: ServiceError | None) -> None:
        if self._is_transferred or self._has_output:
            return
        self.suspect = self._placement.prefill
        if error is None:
            name = self._placement.prefill.name
            raise Unavailable(
                f"prefill instance {name!r} ended the request too early", reason="INSTANCE_LOST"
            )
        if self._first is None or not isinstance(error, Unavailable):
            raise error
        # Its last piece may have arrived before it died: then decode goes on by itself.
        self._give_up_at = self._clock() + HANDOFF_GRACE_S

    async def _await_transferred(self) -> None:
        """Gives the end of the transfer a moment to be told, for the request's stats."""
        if self._call is None or not self._has_output or self._is_transferred:
            return
        try:
            async with asyncio.timeout(STATS_GRACE_S):
                while not self._is_transferred and not self._call.task.done():
                    event = await self._inbox.get()
                    if isinstance(event, Transferred):
                        self._take_transferred(event)
                    elif isinstance(event, PrefillEnded):
                        return
        except TimeoutError:
            return

    def _remaining_s(self) -> float:
        return max(0.001, self._deadline - self._clock())

    # ---- ending

    def close(self) -> None:
        """Gives everything back; what needs an answer from an instance goes on by itself."""
        self._closing.set()
        if self._decode is not None:
            self._decode.detach(self._id)
        self._admission.end_prefill(self._id)
        if self._call is not None and self._prefill is not None:
            self._tasks.spawn(self._end_prefill(self._call, self._prefill))
        if self._decode is None or (self._is_finished and self._has_output):
            # Decode has freed its own when it sent the last token.
            self._admission.release(self._id)
        else:
            self._tasks.spawn(self._abort_decode(self._decode))

    async def _end_prefill(self, call: PrefillCall, prefill: PrefillLink) -> None:
        if self._is_finished:
            # It ends by itself; only an instance that does not must be told.
            await asyncio.wait({call.task}, timeout=HANDOFF_GRACE_S)
        if not call.task.done():
            call.cancel()
            await self._confirm(prefill.abort, "prefill")

    async def _abort_decode(self, decode: DecodeLink) -> None:
        """Keeps the ledger's blocks until decode has confirmed that it freed its own."""
        try:
            if self._reserving is not None:
                await asyncio.wait({self._reserving})
            await self._confirm(decode.abort, "decode")
        finally:
            self._admission.release(self._id)

    async def _confirm(self, abort: Callable[[int], Awaitable[bool]], role: str) -> None:
        for _ in range(_ABORT_TRIES):
            if await abort(self._id):
                return
        _log.warning(
            "a %s instance did not confirm an abort",
            role,
            extra={"request_id": f"{self._id:016x}"},
        )


def _is_passing(error: ServiceError) -> bool:
    """Whether decode only lacks for a moment what the ledger says it has."""
    return (isinstance(error, Refused) and error.retryable) or error.reason == "NO_RUN_STREAM"


def _as_unavailable(error: ServiceError) -> ServiceError:
    if isinstance(error, Refused) and error.retryable:
        return Unavailable(f"decode had no room after all: {error.message}", reason=error.reason)
    return error
