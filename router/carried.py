"""Owns one try of one request that begins with the KV that another try has at its decode instance.

No prefill instance takes part: decode reserves, takes the KV from where the sequence was, and goes
on from the last token that was generated there. Like any try it gives back what it holds, exactly
once, in background work.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from router.admission import Admission
from router.decode_link import DecodeLink
from router.departure import Departure, sent_away
from router.events import (
    DecodeEvent,
    DecodeFailed,
    Granted,
    Output,
    Paused,
    Sent,
    TransferLost,
)
from router.inbox import Inbox
from router.ledger import InstanceKey
from router.pools import Pools
from router.prefill_leg import confirm_abort
from router.request import Stats, Tokens, ValidRequest
from router.tasks import Tasks
from service.errors import ServiceError, Unavailable

# Long enough for the KV of any sequence; the instances tell much sooner of one that cannot come.
CARRY_TIMEOUT_S = 30.0
# Where the sequence's instance is lost, all of the KV may have come all the same.
HANDOFF_GRACE_S = 1.0
# The end of the transfer is told on another stream than the tokens that it made possible.
_SENT_GRACE_S = 0.2


class Carried:
    """One try: `bring` the sequence, then as router.attempt.Attempt.

    Its room is in the ledger, under `request_id`, when it is made.
    """

    def __init__(
        self,
        request_id: int,
        decode_key: InstanceKey,
        dp_rank: int = 0,
        *,
        pools: Pools,
        admission: Admission,
        tasks: Tasks,
        stats: Stats,
        deadline: float,
        clock: Callable[[], float],
    ) -> None:
        self._id = request_id
        self._decode_key = decode_key
        self._dp_rank = dp_rank
        self._pools = pools
        self._admission = admission
        self._tasks = tasks
        self._stats = stats
        self._deadline = deadline
        self._clock = clock
        # What happens here, and at the instance that the sequence comes from.
        self._inbox: Inbox[tuple[bool, DecodeEvent]] = Inbox()
        self._decode: DecodeLink | None = None
        self._source: Departure | None = None
        self._reserving: asyncio.Task[None] | None = None
        self._last_token_id = 0
        self._tokens = 0
        self._is_granted = False
        self._sent: Sent | None = None
        # Tokens that came before it was certain that all is here.
        self._early: deque[Tokens] = deque()
        self._has_output = False
        self._is_finished = False
        self._departure: Departure | None = None
        self.suspect: InstanceKey | None = None
        self.past: Callable[[Tokens], bool] | None = None

    @property
    def decode_key(self) -> InstanceKey | None:
        return self._decode_key

    @property
    def has_output(self) -> bool:
        """Whether decode has given tokens in this try."""
        return self._has_output

    @property
    def kv_bytes(self) -> int:
        """What was sent; 0 where the end of the transfer was not heard of."""
        return self._sent.kv_bytes if self._sent is not None else 0

    # ---- the sequence comes

    async def bring(self, source: Departure, request: ValidRequest, last_token_id: int) -> None:
        """Takes a paused sequence over; returns once all of its KV is here.

        `request` is what has its KV at the source: all tokens but the last one, `last_token_id`.
        Raises ServiceError, and then the sequence is still where it was, unless that instance has
        failed as well; `suspect` names this one where it did.
        """
        self._source = source
        self._last_token_id = last_token_id
        self._tokens = len(request.prompt_token_ids) + 1  # and the last one
        assert source.paused is not None
        found, wanted = source.paused.tokens, len(request.prompt_token_ids)
        if found != wanted:
            raise Unavailable(
                f"decode instance {source.instance.key.name!r} has the KV of {found} tokens,"
                f" not of {wanted}",
                reason="OUT_OF_STEP",
            )
        source.divert(lambda event: self._inbox.put_nowait((False, event)))
        self.suspect = self._decode_key
        self._decode = self._pools.decode(self._decode_key)
        self._decode.attach(self._id, self._hear)
        self.suspect = None
        self._reserving = asyncio.create_task(
            self._reserve(self._decode, source, source.paused.ranks, request)
        )
        try:
            async with asyncio.timeout(CARRY_TIMEOUT_S) as limit:
                while self._sent is None and not self._early:
                    self._take(*await self._inbox.get())
                    if source.has_failed:
                        # All of it may be here by now: then tokens come, and else nothing may.
                        limit.reschedule(asyncio.get_running_loop().time() + HANDOFF_GRACE_S)
        except TimeoutError:
            raise Unavailable("the KV did not come", reason="CARRY_TIMEOUT") from None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SENT_GRACE_S):
                while self._sent is None and not source.has_failed:
                    self._take(*await self._inbox.get())
        self._stats.decode_instance = self._decode_key.name

    async def _reserve(
        self,
        decode: DecodeLink,
        source: Departure,
        ranks: tuple[int, ...],
        request: ValidRequest,
    ) -> None:
        """Posts the outcome of the reservation. Never cancelled, as in Attempt."""
        remaining_s = max(0.001, self._deadline - self._clock())
        try:
            grant = await decode.reserve(
                self._id,
                request,
                source.instance,
                0,
                remaining_s,
                self._dp_rank,
                source_ranks=ranks,
            )
        except ServiceError as exc:
            self._inbox.put_nowait((True, DecodeFailed(exc)))
        else:
            self._inbox.put_nowait((True, Granted(grant)))

    def _take(self, is_here: bool, event: DecodeEvent) -> None:
        """Takes note of an event on the way; raises ServiceError where it cannot succeed."""
        assert self._source is not None
        match event:
            case Granted(grant):
                assert self._decode is not None
                self._is_granted = True
                self._source.send(grant)
                self._decode.activate(self._id, self._last_token_id)
            case Output(tokens):
                self._early.append(tokens)
            case Sent():
                self._sent = event
            case TransferLost(error=error):
                if not self._early:
                    raise error
            case DecodeFailed(error) if is_here:
                self.suspect = self._decode_key
                raise error
            case DecodeFailed(error):
                if not self._is_granted:
                    raise error

    # ---- the sequence is here

    def start(self) -> None:
        """Nothing is left to be begun."""

    def _hear(self, event: DecodeEvent) -> None:
        """Takes in what is told here."""
        past = self.past
        if past is not None and self._inbox.is_awaited and isinstance(event, Output):
            is_plain = event.tokens.finish is None and self._has_output
            if is_plain and self._departure is None and past(event.tokens):
                self._note_output(event.tokens)
                return
        self._inbox.put_nowait((True, event))

    async def next_tokens(self) -> Tokens | None:
        """Returns what was generated next; None where the sequence has paused, as asked.

        Raises ServiceError; `suspect` then names the instance that failed.
        """
        while True:
            tokens = self._early.popleft() if self._early else self._heard(*await self._inbox.get())
            if tokens is not None:
                self._has_output = True
                self._note_output(tokens)
                self._is_finished = tokens.finish is not None
                return tokens
            if self._departure is not None and self._departure.paused is not None:
                return None

    def _note_output(self, tokens: Tokens) -> None:
        self._tokens += len(tokens.token_ids)
        self._admission.grow(self._id, self._tokens)

    def _heard(self, is_here: bool, event: DecodeEvent) -> Tokens | None:
        if not is_here:
            return None
        match event:
            case Output(tokens):
                return tokens
            case Paused() if self._departure is not None:
                self._departure.paused = event
            case Sent():
                raise sent_away(self._decode_key)
            case TransferLost(error=error):
                if not self._has_output:
                    raise error
            case DecodeFailed(error):
                self.suspect = self._decode_key
                raise error
        return None

    def depart(self) -> Departure:
        """As Attempt.depart."""
        assert self._decode is not None
        self._departure = Departure(
            self._id,
            self._decode,
            inbox=lambda event: self._inbox.put_nowait((True, event)),
            pending=self._take_pending,
        )
        return self._departure

    def stay(self) -> None:
        """As Attempt.stay."""
        if self._departure is not None:
            self._departure.go_back()
        self._departure = None

    def _take_pending(self) -> list[DecodeEvent]:
        return [event for is_here, event in self._inbox.take_all() if is_here]

    def close(self) -> None:
        """Gives everything back; what needs an answer from an instance goes on by itself."""
        if self._decode is not None:
            self._decode.detach(self._id)
        if self._decode is None or self._reserving is None or self._is_finished:
            self._admission.release(self._id)
        else:
            self._tasks.spawn(self._abort(self._decode, self._reserving))

    async def _abort(self, decode: DecodeLink, reserving: "asyncio.Task[None]") -> None:
        """Keeps the ledger's blocks until decode has confirmed that it freed its own."""
        try:
            await asyncio.wait({reserving})
            await confirm_abort(decode.abort, self._id, "decode")
        finally:
            self._admission.release(self._id)
