"""Owns who gets room and when: joins queue, ledger, policy, shares, caps and forecast.

Pure: time is handed in, what is decided is handed back, and `admission` acts on it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from router.fairness import BrokenCap, FairShares, Tenants, Usage
from router.forecast import Forecast, Load, Owed
from router.ledger import InstanceKey, Ledger, Need, Placement
from router.local_prefill import LocalPrefill
from router.output_lengths import OutputLengths
from router.overcommit import Held, risks
from router.policy import RoutingPolicy
from router.queue import AdmissionQueue, QueueFull, Waiting
from router.room import Misfits, Room
from service.errors import DeadlineExceeded, Refused, ServiceError, Unavailable

# What a client is told to wait where nothing is known: about how long short answers take. It is
# also what a request is first taken to hold its room for.
RETRY_AFTER_S = 1.0

# A request that waits no more: it has its place, or its wait was of no use.
Decision = tuple[Waiting, Placement | ServiceError]


@dataclass(kw_only=True)
class _Holding:
    """What a request holds, and what its tenant was charged for it, in KV-seconds."""

    waiting: Waiting
    placement: Placement
    owed_tokens: int
    tokens: int
    # What its sequence has come to, prompt and all.
    came_to: int
    began_at: float
    since: float
    charged: float
    used: float = 0.0
    prefilled_at: float | None = None

    def hold(self, tokens: int, now: float) -> None:
        """Go on with another amount of room."""
        self.used += self.tokens * (now - self.since)
        self.tokens, self.since = tokens, now


class Gate:
    """Decides on requests in order, as room comes and goes.

    `grace_s` is how long a role may be without any instance before its requests fail: long enough
    for a restart. Patient ones wait on, to their own limit. Unless `refuses_early`, whatever wait
    is foretold is only noted.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        policy: RoutingPolicy,
        tenants: Tenants,
        max_queue: int,
        max_bypasses: int,
        grace_s: float,
        refuses_early: bool,
        local: LocalPrefill | None = None,
        lengths: OutputLengths | None = None,
    ) -> None:
        self._ledger = ledger
        self.local = local or LocalPrefill(0)
        self.lengths = lengths or OutputLengths()
        self._policy = policy
        self._tenants = tenants
        self._shares = FairShares(tenants)
        self.queue = AdmissionQueue(
            max_requests=max_queue,
            max_bypasses=max_bypasses,
            tenants=tenants,
            shares=self._shares,
        )
        self._grace_s = grace_s
        self._refuses_early = refuses_early
        self._forecast = Forecast()
        self._owed = Owed()
        self._holdings: dict[int, _Holding] = {}
        self._held_by: dict[str, Usage] = {}
        self._misfits = Misfits()
        # Those that have come since all others were tried; None: others may fit that did not.
        self._newcomers: list[Waiting] | None = None
        # When the last instance of a role went away; -inf: there was none ever.
        self._absent_since: dict[str, float | None] = {"prefill": -math.inf, "decode": -math.inf}

    # ---- coming

    def check_queue(self, tenant: str, priority: int, needed: int) -> None:
        """Raises Refused where the queue has no place for a new request, whatever it asks for.

        `needed` are the tokens that it is known to ask for.
        """
        if not self.queue.has_place(tenant, priority):
            raise self._queue_full(needed)

    def offer(self, waiting: Waiting, now: float) -> list[Decision]:
        """Takes a request into the queue; returns what that decides for others.

        Raises Refused (a cap, a wait that is of no use, a full queue, never fits), Unavailable (a
        role has no instance) and DeadlineExceeded.
        """
        if waiting.start_by <= now:
            raise DeadlineExceeded
        waiting.need = self._ledger.asked(waiting.need)
        if not waiting.patient:
            self._check_places(waiting, now)
        waiting.came_at = now
        waiting.need = self.lengths.expect(waiting.tenant, waiting.need)
        waiting.room_tokens = self._room_tokens(waiting.need)
        waiting.hold_s = self._hold_s(waiting)
        is_new = not (waiting.resumes or waiting.again)
        if is_new or waiting.is_new_here:
            self._check_caps(waiting)
        if is_new:
            self._check_wait(waiting, now)
        try:
            gives_way = self.queue.push(waiting)
        except QueueFull as exc:
            raise self._queue_full(waiting.need.total_tokens) from exc
        if self._newcomers is not None:
            self._newcomers.append(waiting)
        if gives_way is None:
            return []
        self._newcomers = None
        return [(gives_way, self._queue_full(gives_way.need.total_tokens))]

    def _check_caps(self, waiting: Waiting) -> None:
        if not self._tenants.have_caps:
            return
        tenant, tokens = waiting.tenant, waiting.need.total_tokens
        broken = self._tenants.broken_cap(tenant, self.usage(tenant), tokens)
        if broken is not None:
            raise self._over_cap(broken)

    def _check_wait(self, waiting: Waiting, now: float) -> None:
        predicted_s = self._predict(waiting, now)
        waiting.predicted_s = predicted_s
        if predicted_s is None or not self._refuses_early:
            return
        if now + predicted_s > waiting.start_by:
            raise self._refusal("PREDICTED_WAIT", waiting.need.total_tokens, predicted_s)

    def _predict(self, waiting: Waiting, now: float) -> float | None:
        room = self._ledger.decode_room()
        load = Load(
            before=self.queue.before(waiting),
            own_tokens=waiting.room_tokens,
            free_tokens=room.free_tokens,
            capacity_tokens=room.tokens,
            free_sequences=room.free_sequences,
            capacity_sequences=room.sequences,
            prefills=self._ledger.prefill_keys(),
            owed=self._owed.before(waiting.priority, waiting.tenant, waiting.need.prompt_tokens),
        )
        return self._forecast.wait_s(load, now)

    def _hold_s(self, waiting: Waiting) -> float:
        return self._forecast.hold_s(waiting.tenant, waiting.need) or RETRY_AFTER_S

    def _room_tokens(self, need: Need) -> int:
        """What a request will be booked at decode, as the instances of now would."""
        if not need.decodes:
            return 0
        decode = next(iter(self._ledger.decodes()), None)
        if decode is None:
            return need.total_tokens
        return decode.capacity.blocks_at_first(need) * decode.capacity.block_size

    # ---- being decided upon

    def decide(self, now: float) -> list[Decision]:
        """Ends the waits that can end now; costs next to nothing while nobody waits."""
        if not len(self.queue):
            return []
        decisions: list[Decision] = [
            (waiting, self._refusal("QUEUE_WAIT", waiting.need.total_tokens, self._retry_after_s()))
            for waiting in self.queue.take_expired(now)
        ]
        decisions += self._placeless(now)
        # One that has gone may have held others back.
        if not decisions and self._newcomers is not None and len(self._newcomers) < len(self.queue):
            room = self._room(now)
            if not any(w.is_queued and room.place(w) is not None for w in self._newcomers):
                self._newcomers.clear()
                return []
        while len(self.queue):
            found = self.queue.next_admissible(self._room(now))
            if found is None:
                break
            self._book(*found, now)
            decisions.append(found)
        self._newcomers = []
        return decisions

    def room_came_back(self) -> None:
        """To be called where there may be more room though nothing was given back here."""
        self._room_came_back()

    def _room_came_back(self) -> None:
        self._misfits = Misfits()
        self._newcomers = None

    def _room(self, now: float) -> Room:
        return Room(self._ledger, self._policy, self._misfits, now, self.local)

    def next_moment(self, now: float) -> float | None:
        """When `decide` has to be asked even if nothing changes; None while nobody waits."""
        expiry = self.queue.next_expiry()
        if expiry is None:
            return None
        ends_of_grace = [s + self._grace_s for s in self._absent_since.values() if s is not None]
        return min(expiry, *(moment for moment in ends_of_grace if moment > now), math.inf)

    def end_all(self, error: Callable[[], ServiceError]) -> list[Decision]:
        """Ends the wait of every queued request."""
        return [(waiting, error()) for waiting in self.queue.take(lambda _: True)]

    def withdraw(self, waiting: Waiting) -> None:
        """Takes a request out of the queue; no error where it is not in."""
        if waiting.is_queued:
            self._newcomers = None
        self.queue.discard(waiting)

    def has_room(self, tenant: str, need: Need) -> bool:
        """Whether a request could be placed this moment."""
        need = self.lengths.expect(tenant, need)
        waiting = Waiting(request_id=0, need=need, priority=0, start_by=0.0)
        return self._room(0.0).place(waiting) is not None

    def place(self, waiting: Waiting, now: float) -> Placement | None:
        """Books room that is there this moment, past the queue; None where there is none."""
        waiting.need = self.lengths.expect(waiting.tenant, waiting.need)
        placement = self._room(now).place(waiting)
        if placement is not None:
            self._book(waiting, placement, now)
        return placement

    def _placeless(self, now: float) -> list[Decision]:
        if all(since is None for since in self._absent_since.values()):
            return []
        decisions: list[Decision] = []
        for waiting in self.queue.take(
            lambda w: not w.patient and self._missing_role(w, now) is not None
        ):
            missing = self._missing_role(waiting, now)
            assert missing is not None
            decisions.append((waiting, _no_instance(missing)))
        return decisions

    # ---- holding room

    def _book(self, waiting: Waiting, placement: Placement, now: float) -> None:
        request_id, need = waiting.request_id, waiting.need
        if not self._ledger.try_reserve(request_id, need, placement):
            raise AssertionError("the policy chose a placement that the ledger refuses")
        tokens = self._ledger.room_of(request_id) or need.prompt_tokens
        charged = tokens * self._hold_s(waiting)
        owed_tokens = max(0, need.prompt_tokens - placement.cached_tokens)
        if placement.prefill is None:
            owed_tokens = 0
        self._holdings[request_id] = _Holding(
            waiting=waiting,
            placement=placement,
            owed_tokens=owed_tokens,
            tokens=tokens,
            came_to=need.prompt_tokens,
            began_at=now,
            since=now,
            charged=charged,
        )
        usage = self._held_by.setdefault(waiting.tenant, Usage())
        usage.requests += 1
        usage.tokens += need.total_tokens
        self._shares.serve(waiting.priority, waiting.tenant, charged)
        self._owed.add(waiting.priority, waiting.tenant, owed_tokens)
        if placement.prefill is not None:
            self._forecast.prefill_began(placement.prefill, now)
        self.local.began(placement, need)

    def is_overcommitted(self, request_id: int) -> bool:
        """Whether a request that has been booked may come to more than that."""
        holding, room = self._holdings[request_id], self._ledger.room_of(request_id)
        need = holding.waiting.need
        return need.decodes and room is not None and room < need.total_tokens

    def grow(self, request_id: int, tokens: int, now: float) -> bool:
        """A sequence at decode has come to so many tokens.

        Returns whether that is the first time that they are more than was booked for it.
        """
        has_outgrown = self._ledger.grow(request_id, tokens)
        holding = self._holdings.get(request_id)
        if holding is None:
            return has_outgrown
        holding.came_to = tokens
        room = self._ledger.room_of(request_id)
        if room is not None and room > holding.tokens:
            holding.hold(room, now)
        return has_outgrown

    def overcommit_risks(self) -> dict[InstanceKey, float]:
        """How likely the sequences are to need more than there is, where not all is booked."""
        promises = self._ledger.promises()
        if not promises:
            return {}
        return risks(self._at_decode(), promises, self.lengths)

    def _at_decode(self) -> Iterator[Held]:
        # Metrics are read in another thread while requests come and go.
        for holding in list(self._holdings.values()):
            placement, waiting = holding.placement, holding.waiting
            if placement.decode is not None:
                yield Held(
                    key=placement.decode,
                    dp_rank=placement.dp_rank,
                    tenant=waiting.tenant,
                    need=waiting.need,
                    tokens=holding.came_to,
                )

    def end_prefill(self, request_id: int, now: float) -> None:
        """Prefill owes this request nothing any more; no error where it never did."""
        if len(self.queue) and any(v.is_full for v in self._ledger.prefills()):
            self._room_came_back()
        self._ledger.end_prefill(request_id)
        self._note_given_back(request_id, now)

    def release(self, request_id: int, now: float) -> None:
        """Frees what the request holds, at any moment and as often as one likes."""
        if self._ledger.release(request_id):
            self._room_came_back()
        self._note_given_back(request_id, now)

    def _note_given_back(self, request_id: int, now: float) -> None:
        holding = self._holdings.get(request_id)
        if holding is None:
            return
        waiting = holding.waiting
        if holding.prefilled_at is None:
            holding.prefilled_at = now
            self._owed.add(waiting.priority, waiting.tenant, -holding.owed_tokens)
            prefill = holding.placement.prefill
            if prefill is not None:
                self._forecast.prefill_ended(prefill, holding.owed_tokens, now)
            self.local.ended(holding.placement, waiting.need)
        if self._ledger.room_of(request_id) is None:
            self._end(self._holdings.pop(request_id), now)

    def _end(self, holding: _Holding, now: float) -> None:
        waiting = holding.waiting
        holding.hold(0, now)
        held_s = now - holding.began_at
        if waiting.need.decodes and held_s > 0:
            assert holding.prefilled_at is not None
            self._forecast.room_came_back(
                waiting.tenant,
                waiting.need,
                tokens=holding.used / held_s,
                before_s=holding.prefilled_at - holding.began_at,
                decode_s=now - holding.prefilled_at,
                now=now,
            )
        self._shares.correct(waiting.priority, waiting.tenant, holding.used - holding.charged)
        usage = self._held_by[waiting.tenant]
        usage.requests -= 1
        usage.tokens -= waiting.need.total_tokens
        if not usage.requests:
            del self._held_by[waiting.tenant]

    # ---- instances

    def instances_changed(self, now: float) -> None:
        """To be called after every change of the ledger's instances."""
        self._room_came_back()
        self.local.keep(self._ledger.keys())
        prefills = self._ledger.prefills()
        for role, views in (("prefill", prefills), ("decode", self._ledger.decodes())):
            if views:
                self._absent_since[role] = None
            elif self._absent_since[role] is None:
                self._absent_since[role] = now
        self._forecast.keep_prefills(
            {view.key for view in prefills}
            | {
                h.placement.prefill
                for h in self._holdings.values()
                if h.prefilled_at is None and h.placement.prefill is not None
            }
        )

    def _check_places(self, waiting: Waiting, now: float) -> None:
        """Raises where no instance of now, or of a moment ago, could ever take the request."""
        need = waiting.need
        missing = self._missing_role(waiting, now)
        if missing is not None:
            raise _no_instance(missing)
        if self._is_complete(need) and not self._ledger.fits_ever(need):
            raise self._refusal("NEVER_FITS", need.total_tokens, retry_after_s=None)

    def _missing_role(self, waiting: Waiting, now: float) -> str | None:
        need = waiting.need
        for role in self._roles(need):
            since = self._absent_since[role]
            if since is not None and since + self._grace_s <= now:
                if role == "prefill" and self.local.can_do_without(
                    self._ledger.decodes(), need, waiting.cached_tokens
                ):
                    continue
                return role
        return None

    def _is_complete(self, need: Need) -> bool:
        return all(self._absent_since[role] is None for role in self._roles(need))

    def _roles(self, need: Need) -> tuple[str, ...]:
        if self._ledger.is_colocated:
            return ("decode",)
        return ("prefill", "decode") if need.decodes else ("prefill",)

    # ---- what clients are told

    def usage(self, tenant: str) -> Usage:
        """Returns what a tenant's open requests are and may come to hold."""
        held = self._held_by.get(tenant, Usage())
        queued = self.queue.of_tenant(tenant)
        return Usage(
            requests=held.requests + len(queued),
            queued=len(queued),
            tokens=held.tokens + sum(w.need.total_tokens for w in queued),
        )

    def _retry_after_s(self) -> float:
        return max(RETRY_AFTER_S, self._forecast.mean_hold_s or 0.0)

    def _refusal(self, reason: str, needed: int, retry_after_s: float | None) -> Refused:
        free = max(
            (max(0, d.free_blocks) * d.capacity.block_size for d in self._ledger.decodes()),
            default=0,
        )
        return Refused(reason, needed=needed, free=free, retry_after_s=retry_after_s)

    def _queue_full(self, needed: int) -> Refused:
        return self._refusal("QUEUE_FULL", needed, self._retry_after_s())

    def _over_cap(self, broken: BrokenCap) -> Refused:
        is_ever = broken.needed <= broken.limit
        retry_after_s = self._retry_after_s() if is_ever else None
        what_next = f"try again in {retry_after_s:.1f} s" if is_ever else "it can never be more"
        return Refused(
            "TENANT_CAP",
            needed=broken.needed,
            free=max(0, broken.limit - broken.used),
            retry_after_s=retry_after_s,
            message=(
                f"the tenant may have {broken.limit} {broken.what} at once: has {broken.used},"
                f" needs {broken.needed} more; {what_next}"
            ),
        )


def _no_instance(role: str) -> Unavailable:
    return Unavailable(
        f"no {role} instance of the model is registered with this router",
        reason="NO_INSTANCE",
        retry_after_s=RETRY_AFTER_S,
    )
