"""Owns one try of one request at the pools: reserve and prefill side by side, then decode's tokens.

Where decode computes the prompt itself there is no leg at prefill, and the first token is decode's.

A prefill instance that is lost on the way is replaced within the try: decode keeps its room and
what has arrived, and another instance sends the rest. Whatever way a try ends, it gives back what
it holds, exactly once, in background work that a cancelled request does not take down with it.
"""

import asyncio
import logging
from collections.abc import Callable

from router.admission import Admission
from router.decode_link import DecodeLink
from router.departure import Departure, sent_away
from router.events import (
    DecodeEvent,
    DecodeFailed,
    Event,
    FirstToken,
    Grant,
    Granted,
    Output,
    Paused,
    PrefillEnded,
    Regranted,
    ResumeFailed,
    Sent,
    TransferLost,
    Transferred,
)
from router.hedge import Hedge
from router.hedging import Hedging
from router.inbox import Inbox
from router.ledger import InstanceKey, Placement
from router.legs import Legs
from router.metrics import Metrics
from router.pools import Pools
from router.prefill_leg import PrefillLeg, confirm_abort, hear_transferred
from router.request import Stats, Tokens, ValidRequest
from router.reserving import PREEMPTED, refusal, reserve
from router.tasks import Tasks
from router.way import Way
from service.errors import ServiceError, Unavailable

# Where nobody takes over, decode may have had the whole of a lost transfer all the same.
HANDOFF_GRACE_S = 1.0

_log = logging.getLogger(__name__)


class Attempt:
    """One try: `start`, then `next_tokens` until its end, and `close` once at any point.

    The request id is this try's own, so that a late abort of one try cannot hit the next.
    `next_id` gives the id for another prefill instance, or None where there have been enough.
    """

    def __init__(
        self,
        request_id: int,
        request: ValidRequest,
        placement: Placement,
        *,
        pools: Pools,
        admission: Admission,
        metrics: Metrics,
        tasks: Tasks,
        stats: Stats,
        deadline: float,
        clock: Callable[[], float],
        next_id: Callable[[], int | None],
        hedge_id: Callable[[], int | None],
        hedging: Hedging,
    ) -> None:
        self._id = request_id
        self._request = request
        self._placement = placement
        self._pools = pools
        self._admission = admission
        self._metrics = metrics
        self._tasks = tasks
        self._clock = clock
        self._hedging = hedging
        # What happens, and the leg it comes from or is meant for; None: it concerns the whole try.
        self._inbox = inbox = Inbox[tuple[PrefillLeg | None, Event]]()
        self._legs = Legs(
            request,
            pools=pools,
            admission=admission,
            metrics=metrics.admission,
            tasks=tasks,
            deadline=deadline,
            clock=clock,
            next_id=next_id,
            hedge_id=hedge_id,
            decode=placement.decode,
            inbox=lambda leg, event: inbox.put_nowait((leg, event)),
        )
        self._leg: PrefillLeg | None = None
        # Its leg gets no grant before its token has come first: decode takes from one alone.
        self._hedge = Hedge(
            hedging, metrics.survival, lambda: self._leg and self._legs.beside(self._leg)
        )
        self._decode: DecodeLink | None = None
        self._reserving: asyncio.Task[None] | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._first: Tokens | None = None
        self._is_granted = False
        self._is_hedged = False  # what is resumed was not lost: another was faster
        self._is_local = placement.prefill is None
        self._way = Way(stats, clock, goes_on=bool(request.output_tokens), is_local=self._is_local)
        self._is_activated = self._is_local  # decode knows the first token, which is its own
        self._has_output = False
        self._tokens = len(request.prompt_token_ids) + 1  # with the first one, of prefill
        self._is_transferred = False
        self._is_finished = False
        self._transfer_id: int | None = None
        self._lost_transfers: dict[int, ServiceError] = {}
        self._give_up_at: float | None = None
        self._gives_up_with: ServiceError | None = None
        self._departure: Departure | None = None
        self.suspect: InstanceKey | None = None
        self.past: Callable[[Tokens], bool] | None = None

    @property
    def decode_key(self) -> InstanceKey | None:
        return self._placement.decode

    @property
    def has_output(self) -> bool:
        """Whether decode has given tokens."""
        return self._has_output

    async def next_tokens(self) -> Tokens | None:
        """Returns what was generated next; the last of it has `finish` set.

        None says that the sequence has paused at decode, as `depart` has asked.
        Raises ServiceError; `suspect` then names the instance that failed.
        """
        while True:
            tokens = self._take(*await self._next_event())
            if tokens is None:
                if self._departure is not None and self._departure.paused is not None:
                    return None
                continue
            if tokens.finish is not None:
                self._is_finished = True
                if self._has_output and self._decode is not None:
                    self._pools.succeeded(self._decode.instance.key)
                await self._await_transferred()
            return tokens

    # ---- beginning

    def start(self) -> None:
        """Asks prefill for the work and decode for the room at the same time.

        Raises Unavailable where either has gone since it was chosen.
        """
        prefill_key, decode_key = self._placement.prefill, self._placement.decode
        self.suspect = prefill_key
        if prefill_key is not None:
            self._pools.prefill(prefill_key)
        if decode_key is not None:
            self._way.decode_at(decode_key.name)
            self.suspect = decode_key
            self._decode = self._pools.decode(decode_key)
            self._decode.attach(self._id, self._hear)
        self.suspect = None
        self._way.begin()
        if prefill_key is not None:
            self._leg = self._legs.open(self._id, self._placement)
            self._way.prefill_at(prefill_key.name)
            self._hedge.wait(self._uncached)
        if self._decode is not None:
            self._reserving = asyncio.create_task(self._reserve(self._decode, self._leg))

    async def _reserve(self, decode: DecodeLink, leg: PrefillLeg | None) -> None:
        """Posts the outcome of the reservation. Never cancelled while a call is under way."""
        began_at, dp_rank = self._clock(), self._placement.dp_rank

        async def ask() -> Grant:
            remaining_s = self._legs.remaining_s()
            if leg is None:
                return await decode.reserve_local(self._id, self._request, remaining_s, dp_rank)
            source = leg.instance, leg.cp_first
            return await decode.reserve(self._id, self._request, *source, remaining_s, dp_rank)

        try:
            grant = await reserve(ask, self._closing, self._clock)
        except ServiceError as exc:
            self._inbox.put_nowait((None, DecodeFailed(refusal(decode.instance, exc))))
            return
        if grant is not None:
            self._is_granted = True
            self._way.reserved(self._clock() - began_at)
            self._inbox.put_nowait((None, Granted(grant)))

    # ---- what happens

    def _hear(self, event: DecodeEvent) -> None:
        """Takes in what decode tells."""
        past = self.past
        if past is not None and self._inbox.is_awaited and isinstance(event, Output):
            is_plain = event.tokens.finish is None and self._has_output
            if is_plain and self._departure is None and past(event.tokens):
                self._note_output(event.tokens)
                return
        self._inbox.put_nowait((None, event))

    async def _next_event(self) -> tuple[PrefillLeg | None, Event]:
        if self._give_up_at is None:
            return await self._inbox.get()
        try:
            async with asyncio.timeout(self._give_up_at - self._clock()):
                return await self._inbox.get()
        except TimeoutError:
            assert self._gives_up_with is not None
            raise self._gives_up_with from None

    def _take(self, leg: PrefillLeg | None, event: Event) -> Tokens | None:
        """Takes note of an event; returns the tokens it brings, if any. Raises ServiceError."""
        if leg is not None and leg is self._hedge.leg:
            if not isinstance(event, FirstToken):
                self._lose_hedge()
                return None
            self._win_hedge()
        if leg is not None and leg is not self._leg:
            return None  # of an instance that has been replaced
        match event:
            case FirstToken():
                return self._take_first_token(event)
            case Granted(grant):
                self._way.granted(grant)
                # One that came after its prefill instance was lost is replaced by a Regrant.
                if self._leg is not None and self._leg.leg_id == self._id:
                    self._send_grant(self._leg, grant)
                self._activate()
            case Regranted(grant):
                self._take_regranted(grant)
            case Output(tokens):
                if not self._has_output:
                    self._way.second_token()
                    self._legs.note_handed_over(self._leg)
                self._has_output = True
                self._give_up_at = None
                self._note_output(tokens)
                return tokens
            case Transferred():
                self._take_transferred(event)
            case PrefillEnded(error):
                self._take_prefill_ended(error)
            case TransferLost() if self._has_output:
                pass  # of a transfer from there, which a sequence that has stayed no longer needs
            case TransferLost(transfer_id=transfer_id, error=error):
                self._lost_transfers[transfer_id] = error
                self._check_transfer()
            case ResumeFailed(error):
                self._take_resume_failed(error)
            case Paused() if self._departure is not None:
                self._departure.paused = event
            case Sent():
                assert self._placement.decode is not None
                raise sent_away(self._placement.decode)
            case DecodeFailed(error):
                self.suspect = self._placement.decode if error.reason != PREEMPTED else None
                raise error
        return None

    def _note_output(self, tokens: Tokens) -> None:
        self._tokens += len(tokens.token_ids)
        self._admission.grow(self._id, self._tokens)

    def _take_first_token(self, event: FirstToken) -> Tokens | None:
        self._lose_hedge()
        if self._leg is not None:
            if self._leg.leg_id == self._id:
                self._hedging.first_came(self._uncached, self._way.seconds)
            if self._is_transferred or event.tokens.finish is not None:
                self._pools.succeeded(self._leg.key)  # else once decode has the KV
        self._admission.end_prefill(self._id if self._leg is None else self._leg.leg_id)
        tokens = len(self._request.prompt_token_ids) - event.cached_tokens
        if self._leg is not None:
            self._admission.local.computed_at_prefill(self._leg.key, tokens, event.prefill_s)
        elif self._decode is not None:
            here = self._decode.instance
            self._admission.local.computed_at_decode(here, tokens, event.prefill_s)
        self._way.computed(event)
        if self._first is not None:
            # The client has the first instance's; decode goes on from that one.
            return None
        self._first = event.tokens
        self._way.first_token()
        self._has_output = self._is_local
        if event.tokens.finish is None:
            self._activate()
        if self._is_transferred:
            self._drop_leg(is_finished=False)  # the token was all that was still missing
        return event.tokens

    def _activate(self) -> None:
        if self._is_granted and self._first is not None and not self._is_activated:
            assert self._decode is not None
            self._is_activated = True
            self._decode.activate(self._id, self._first.token_ids[0])

    def _send_grant(self, leg: PrefillLeg, grant: Grant) -> None:
        leg.send_grant(grant)
        self._transfer_id = grant.transfer_id
        self._check_transfer()

    def _take_transferred(self, event: Transferred) -> None:
        self._legs.note_handed_over(self._leg, event.handoff_s)
        self._is_transferred = True
        self._way.transferred(event)

    async def _await_transferred(self) -> None:
        """Gives the end of the transfer a moment to be told, for the request's stats."""
        leg = self._leg
        if leg is None or not self._has_output or self._is_transferred:
            return
        event = await hear_transferred(self._inbox, leg)
        if event is not None:
            self._take_transferred(event)

    # ---- another prefill instance takes over

    def _take_prefill_ended(self, error: ServiceError | None) -> None:
        if self._first is not None and (self._is_transferred or self._has_output):
            return
        assert self._leg is not None
        name = self._leg.key.name
        self._lose_prefill(
            error
            or Unavailable(
                f"prefill instance {name!r} ended the request too early", reason="INSTANCE_LOST"
            )
        )

    def _check_transfer(self) -> None:
        """The transfer of now may have been lost before anything was heard of its grant."""
        error = self._lost_transfers.get(self._transfer_id or 0)
        if error is not None and self._leg is not None:
            self._lose_prefill(error)

    def _lose_prefill(self, error: ServiceError) -> None:
        """Looks for another instance; raises the error where only another try can help."""
        leg = self._leg
        assert leg is not None
        self.suspect = leg.key
        # Without any of these there is nothing that another try would lose.
        has_part = self._is_granted or self._first is not None or self._hedge.leg is not None
        if not error.retryable or not has_part:
            raise error
        self._legs.note_lost(leg, error)
        if self._legs.several_could_not_send:
            self.suspect = self._placement.decode
            raise error
        self._replace_leg(error)

    def _replace_leg(self, error: ServiceError) -> None:
        """Goes on with the second instance that was asked, or with another one."""
        self._drop_leg(is_finished=False)
        self._leg = self._hedge.win()
        self._is_hedged = self._leg is not None
        if self._leg is not None:
            self._way.prefill_at(self._leg.key.name)
            if self._decode is None:
                return
        self._transfer_id = None
        self._gives_up_with = error
        if self._resuming is not None:
            self._resuming.cancel()
        self._resuming = asyncio.create_task(self._resume())

    async def _resume(self) -> None:
        """Starts the request at another prefill instance and lets decode take the rest from it."""
        assert self._decode is not None
        assert self._reserving is not None
        try:
            self._leg = leg = self._leg or await self._legs.another()
            self._way.prefill_at(leg.key.name)
            await asyncio.wait({self._reserving})
            if self._is_granted:  # else its failure ends the try
                grant = await self._decode.regrant(
                    self._id, leg.instance, leg.cp_first, self._legs.remaining_s()
                )
                self._inbox.put_nowait((leg, Regranted(grant)))
        except ServiceError as exc:
            self._inbox.put_nowait((self._leg, ResumeFailed(exc)))

    def _take_regranted(self, grant: Grant | None) -> None:
        if grant is None:
            # The last piece had arrived before the instance was lost.
            self._note_resumed("not needed")
            self._is_transferred = True
            if self._first is not None:
                self._drop_leg(is_finished=False)
            return
        self._note_resumed("resumed")
        assert self._leg is not None
        self._send_grant(self._leg, grant)

    def _note_resumed(self, outcome: str) -> None:
        if not self._is_hedged:
            self._metrics.survival.resumed(outcome)

    def _take_resume_failed(self, error: ServiceError) -> None:
        if self._has_output:
            return
        self._note_resumed("failed")
        _log.info(
            "no prefill instance takes over: %s",
            error.message,
            extra={"request_id": f"{self._id:016x}"},
        )
        self._give_up_at = self._clock() + HANDOFF_GRACE_S

    # ---- a second prefill instance is asked beside the first

    @property
    def _uncached(self) -> int:
        return len(self._request.prompt_token_ids) - self._placement.cached_tokens

    def _win_hedge(self) -> None:
        """Turns to the second instance: it alone is to send from here on."""
        if self._leg is not None:
            self._pools.suspect(self._leg.key)  # until it has answered: it may be stuck
        self._replace_leg(Unavailable("prefill is late", reason="INSTANCE_LOST"))

    def _lose_hedge(self) -> None:
        leg = self._hedge.lose()
        if leg is not None:
            self._legs.close(leg, is_finished=False)

    def _drop_leg(self, *, is_finished: bool) -> None:
        leg, self._leg = self._leg, None
        if leg is not None:
            self._legs.close(leg, is_finished=is_finished)

    # ---- leaving decode

    def depart(self) -> Departure:
        """Asks for the sequence to pause, so that it may go on elsewhere; it has output."""
        assert self._decode is not None
        self._departure = Departure(
            self._id,
            self._decode,
            inbox=lambda event: self._inbox.put_nowait((None, event)),
            pending=self._take_pending,
        )
        return self._departure

    def stay(self) -> None:
        """Lets a paused sequence go on here after all."""
        if self._departure is not None:
            self._departure.go_back()
        self._departure = None

    def _take_pending(self) -> list[DecodeEvent]:
        pending = self._inbox.take_all()
        for leg, event in pending:
            if leg is not None:
                self._take(leg, event)  # prefill's last words
        return [event for leg, event in pending if leg is None and isinstance(event, DecodeEvent)]

    # ---- ending

    def close(self) -> None:
        """Gives everything back; what needs an answer from an instance goes on by itself."""
        self._closing.set()
        if self._resuming is not None:
            self._resuming.cancel()
        self._lose_hedge()
        if self._decode is not None:
            self._decode.detach(self._id)
            self._pools.ended(self._decode.instance.key)
        self._admission.end_prefill(self._id)
        self._drop_leg(is_finished=self._is_finished)
        if self._decode is None or (self._is_finished and self._has_output):
            # Decode has freed its own when it sent the last token.
            self._admission.release(self._id)
        else:
            self._tasks.spawn(self._abort_decode(self._decode))

    async def _abort_decode(self, decode: DecodeLink) -> None:
        """Keeps the ledger's blocks until decode has confirmed that it freed its own."""
        try:
            if self._reserving is not None:
                await asyncio.wait({self._reserving})
            await confirm_abort(decode.abort, self._id, "decode")
        finally:
            self._admission.release(self._id)
