"""Who holds what on a decode instance: reservations from the promise to the last free block.

Owns every sequence's state and the block pool. Reservations come from the server's thread, transfer
events from the agent's, steps from the engine's: all go through one lock, held for microseconds,
and for a millisecond where thousands of tokens are looked up or remembered. Knows nothing of gRPC
or of tensors.

A sequence has two independent conditions to run: its KV is complete, and its first token is known.
One whose prompt is computed here runs from the start: the step loop makes both.
Its blocks have two owners, the sequence and the transfer that may still write to them; they are
free when both are done. A transfer that fails leaves its sequence waiting for the next one, with
what has arrived.

A prompt's known beginning is shared with whoever has it too: no transfer and no step writes there.
Once its KV is complete, a prompt's full blocks may be shared in turn; when its sequence ends, with
all that it has written, they stay as cache until somebody needs the room.

Where less is reserved than a sequence may come to, it grows block by block; `decode.growth` decides
who goes when there is none left.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from decode.growth import plan_growth
from decode.prefixes import Prefixes
from decode.refusals import NoRoom, StillOpen
from decode.sequence import Reservation, SequenceRecord, State, Transfer
from engine.blocks import BlockCounts
from engine.errors import OutOfBlocks
from engine.sampling import SequenceState
from kvtransfer import Kept


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What came of sequences that need a block each.

    Attributes:
        grown: Those that have one now, and which.
        lacking: Those that have none yet, and must not step.
        handed_back: Who has to end for them.
    """

    grown: Sequence[tuple[SequenceRecord, int]]
    lacking: frozenset[int]
    handed_back: Sequence[SequenceRecord]


class Admission:
    """The table of sequences, and the rules by which they come and go.

    Args:
        prefixes: Each dp rank's blocks, and what is in them.
        revoke: Tells the transfer agent to let no more data in for a transfer; its confirmation
            comes back through `writer_closed`.
        on_end: Told of each sequence that ends.
        on_room: Called, with the lock held, when a dp rank where a sequence lacks a block may have
            one.
        max_sequences: Sequences held at once, reserved or running.
        expected_output_tokens: Room for so many is reserved at first; None: for all there may be.
    """

    def __init__(
        self,
        *,
        prefixes: Sequence[Prefixes],
        block_size: int,
        max_sequences: int,
        revoke: Callable[[int], None],
        on_end: Callable[["SequenceRecord"], None] = lambda _: None,
        on_room: Callable[[], None] = lambda: None,
        expected_output_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prefixes = prefixes
        self._block_size = block_size
        self._max_sequences = max_sequences
        self._revoke = revoke
        self._on_end = on_end
        self._on_room = on_room
        self._expected_output_tokens = expected_output_tokens
        self._clock = clock
        self._lock = threading.RLock()
        self._by_request: dict[int, SequenceRecord] = {}
        self._by_transfer: dict[int, SequenceRecord] = {}
        # Sequences whose KV is being sent elsewhere, by transfer.
        self._lent: dict[int, SequenceRecord] = {}
        # The dp ranks where a sequence lacks a block: what comes back there is for those it has.
        self._short: frozenset[int] = frozenset()

    def reserve(self, reservation: Reservation) -> SequenceRecord:
        """Hold blocks and a place for a request.

        Raises:
            NoRoom: Too few free blocks or places.
            ValueError: The request is already here.
        """
        most = self._blocks_for(reservation.max_tokens)
        needed = self._blocks_for(self._expected_tokens(reservation))
        with self._lock:
            if reservation.request_id in self._by_request:
                raise ValueError("the request is already reserved here")
            places = self._max_sequences - len(self._by_request)
            if places <= 0:
                raise NoRoom("SEQUENCES_FULL", needed=1, free=0)
            prefixes = self._prefixes[reservation.dp_rank]
            counts = prefixes.pool.counts()
            if most > counts.total or reservation.dp_rank in self._short:
                raise NoRoom("KV_BLOCKS_FULL", needed=most, free=counts.available)
            try:
                taken = prefixes.take(
                    reservation.known_ids,
                    reservation.cache_salt,
                    needed,
                    needs_logits=reservation.is_local,
                )
            except OutOfBlocks as error:
                raise NoRoom("KV_BLOCKS_FULL", needed=error.needed, free=error.free) from error
            own_blocks = taken.blocks[taken.shared :]
            now = self._clock()
            record = SequenceRecord(
                reservation=reservation,
                transfer=Transfer.none()
                if reservation.is_local
                else Transfer(kept=prefixes.kept(taken.tokens)),
                blocks=taken.blocks,
                own_blocks=own_blocks,
                cached_tokens=taken.tokens,
                computed_tokens=taken.tokens,
                came_s=now,
                deadline_s=now + reservation.ttl_s,
                sampling=SequenceState(
                    reservation.sampling,
                    prompt_len=reservation.own_prompt_tokens,
                    prompt_ids=reservation.prompt_ids,
                    output_ids=reservation.output_ids,
                    min_new_tokens=reservation.stop.min_new_tokens,
                    suppressed_ids=reservation.stop.end_token_ids,
                ),
            )
            self._by_request[reservation.request_id] = record
            if not reservation.is_local:
                prefixes.pool.pin(own_blocks)
                self._by_transfer[record.transfer.transfer_id] = record
            return record

    def regrant(self, request_id: int) -> SequenceRecord | None:
        """Give a reservation whose transfer has failed another one.

        Returns:
            The sequence, with its new transfer; None where its KV is complete after all.

        Raises:
            KeyError: The request is not here, or computed here.
            StillOpen: Its transfer has not ended.
        """
        with self._lock:
            record = self._by_request[request_id]
            if record.reservation.is_local:
                raise KeyError(request_id)
            if record.kv_complete:
                return None
            if not record.transfer.over.done():
                raise StillOpen(record.transfer)
            self._of(record).pool.pin(record.own_blocks)
            record.transfer = Transfer(kept=record.kept)
            self._by_transfer[record.transfer.transfer_id] = record
            return record

    def activate(self, request_id: int, first_token_id: int) -> bool:
        """The first token is known; True when the sequence may now run."""
        with self._lock:
            record = self._by_request.get(request_id)
            if record is None or record.last_token_id is not None or record.reservation.is_local:
                return False
            record.append(first_token_id)
            return self._start_if_ready(record)

    def begin(self, request_id: int) -> bool:
        """True when the step loop may now compute the sequence's prompt."""
        with self._lock:
            record = self._by_request.get(request_id)
            if record is None or record.handed_back:
                return False
            assert record.reservation.is_local
            self._run(record)
            return True

    def look_again(self, request_id: int) -> bool:
        """Look up a prompt once more of which nothing is computed; whether its blocks are others.

        They are where more of it is known by now than when it was reserved.
        """
        with self._lock:
            record = self._by_request[request_id]
            prefixes, reservation = self._of(record), record.reservation
            shared = len(record.blocks) - len(record.own_blocks)
            taken = prefixes.take_again(
                reservation.known_ids, reservation.cache_salt, record.blocks, shared
            )
            if taken is None:
                return False
            prefixes.pool.mark_used(taken.blocks)
            record.blocks, record.own_blocks = taken.blocks, taken.blocks[taken.shared :]
            record.cached_tokens = record.computed_tokens = taken.tokens
            return True

    def computed(self, request_id: int, tokens: int) -> SequenceRecord:
        """Note that a step has computed more tokens of a prompt; the sequence."""
        with self._lock:
            record = self._by_request[request_id]
            record.computed_tokens += tokens
            record.kv_complete = not record.missing_tokens
            self._remember(record)
            return record

    def complete(self, transfer_id: int) -> SequenceRecord | None:
        """Its KV is whole and checked; the sequence, when it may now run."""
        with self._lock:
            record = self._close_writer(transfer_id)
            if record is None or record.state is not State.RESERVED:
                return None
            record.kv_complete = True
            self._remember(record)
            return record if self._start_if_ready(record) else None

    def writer_closed(self, transfer_id: int, kept: Kept = ()) -> SequenceRecord | None:
        """No write of this transfer can reach a block any more, and the KV is not whole.

        Returns:
            The sequence, where it still counted on the transfer: it waits for another one now.
        """
        with self._lock:
            record = self._close_writer(transfer_id)
            if record is None or record.state is State.ENDED:
                return None
            record.kept = self._of(record).kept(record.cached_tokens, kept)
            return record

    def pause(self, request_id: int) -> SequenceRecord | None:
        """Note that a running sequence leaves its batch; None where it is not here, or has left.

        One whose prompt is not computed yet is none that could come back: nothing is noted then.
        """
        with self._lock:
            record = self._by_request.get(request_id)
            if record is None or record.state is not State.RUNNING or record.is_paused:
                return None
            record.is_paused = not record.missing_tokens
            return record

    def resume(self, request_id: int) -> SequenceRecord | None:
        """Note that a paused sequence joins its batch again; None where there is none."""
        with self._lock:
            record = self._by_request.get(request_id)
            if record is None or not record.is_paused:
                return None
            record.is_paused = False
            return record

    def lend(self, request_id: int, transfer_id: int) -> SequenceRecord | None:
        """A transfer is about to read a paused sequence's KV: its blocks stay until `returned`.

        Returns:
            The sequence; None where it is not here, or not paused.
        """
        with self._lock:
            record = self._by_request.get(request_id)
            if record is None or not record.is_paused:
                return None
            self._of(record).pool.pin(record.blocks)
            self._lent[transfer_id] = record
            return record

    def returned(self, transfer_id: int) -> SequenceRecord | None:
        """No rank reads for this transfer any more; the sequence that it was of, the first time."""
        with self._lock:
            record = self._lent.pop(transfer_id, None)
            if record is not None:
                self._of(record).pool.unpin(record.blocks)
            return record

    @property
    def overcommits(self) -> bool:
        """Whether sequences may have to `grow`."""
        return self._expected_output_tokens is not None

    def grow(self, request_ids: Iterable[int]) -> Growth:
        """Give a block to each of these running sequences whose next token has no cell.

        They must be in no step, and all that are in none have to be named. Where a dp rank lacks a
        block and none is about to come back, its latest sequence is marked to be handed back: the
        caller ends it, whereupon this may be called again.
        """
        grown: list[tuple[SequenceRecord, int]] = []
        waiting: list[SequenceRecord] = []
        handed_back: list[SequenceRecord] = []
        with self._lock:
            records = [self._by_request[request_id] for request_id in request_ids]
            lacking = [record for record in records if self._lacks(record)]
            for dp_rank in {record.dp_rank for record in lacking}:
                plan = plan_growth(
                    [record for record in lacking if record.dp_rank == dp_rank],
                    [r for r in self._by_request.values() if r.dp_rank == dp_rank],
                    self._prefixes[dp_rank].pool.counts(),
                )
                grown += [(record, self._take_block(record)) for record in plan.grow]
                waiting += plan.wait
                if plan.hand_back is not None:
                    plan.hand_back.handed_back = True
                    handed_back.append(plan.hand_back)
            self._short = frozenset(record.dp_rank for record in waiting)
            waiting += [record for record in records if record.handed_back]
        return Growth(
            grown=grown,
            lacking=frozenset(record.request_id for record in waiting),
            handed_back=handed_back,
        )

    def end(self, request_id: int) -> SequenceRecord | None:
        """Give back what a request holds. Must not be called while a step reads its blocks."""
        with self._lock:
            record = self._by_request.get(request_id)
            if record is not None:
                self._end(record)
            return record

    def end_unless_running(self, request_id: int) -> bool:
        """As `end`, but False for a running sequence: the step loop has to end it."""
        with self._lock:
            record = self._by_request.get(request_id)
            if record is not None and record.state is State.RUNNING:
                return False
            self.end(request_id)
            return True

    def running(self, request_id: int) -> SequenceRecord:
        """A running request's sequence: it lives until the step loop ends it."""
        with self._lock:
            return self._by_request[request_id]

    def holds(self, request_id: int) -> bool:
        """Whether the request still has a sequence here."""
        with self._lock:
            return request_id in self._by_request

    def of_router(self, router_id: str) -> list[int]:
        """The requests that a router holds here."""
        with self._lock:
            records = list(self._by_request.values())
        return [r.request_id for r in records if r.reservation.router_id == router_id]

    def of_router_process(self, router_id: str) -> set[int]:
        """The requests of all streams of a router, each of which has an id that begins with its."""
        return {
            record.request_id
            for record in self.all()
            if record.reservation.router_id.startswith(f"{router_id}.")
        }

    def held_by(self, request_ids: Iterable[int]) -> dict[int, list[int]]:
        """What those of these requests that are here hold, each as in `totals`."""
        with self._lock:
            records = [self._by_request[i] for i in request_ids if i in self._by_request]
            return {record.request_id: self._amounts(record) for record in records}

    @property
    def totals(self) -> list[int]:
        """The blocks of each dp rank, and the places for sequences."""
        return [*(p.pool.counts().total for p in self._prefixes), self._max_sequences]

    def all(self) -> list[SequenceRecord]:
        """The sequences that are here, reserved or running."""
        with self._lock:
            return list(self._by_request.values())

    def expired(self) -> list[SequenceRecord]:
        """The sequences whose time is up."""
        now = self._clock()
        with self._lock:
            return [r for r in self._by_request.values() if r.deadline_s <= now]

    def remaining_s(self, record: SequenceRecord) -> float:
        """Time until a sequence's deadline."""
        return max(0.0, record.deadline_s - self._clock())

    def counts(self) -> BlockCounts:
        """Blocks by state."""
        with self._lock:
            return self._counts()

    @property
    def held(self) -> int:
        """Sequences here, reserved or running."""
        return len(self._by_request)

    def check_integrity(self) -> None:
        """Raise where the table and the pool disagree."""
        with self._lock:
            for prefixes in self._prefixes:
                prefixes.check_integrity()
            held = len({(r.dp_rank, i) for r in self._by_request.values() for i in r.blocks})
            counts = self._counts()
            assert counts.reserved + counts.used == held, (counts, held)
            written = [(r.dp_rank, i) for r in self._by_transfer.values() for i in r.own_blocks]
            assert len(set(written)) == len(written), "two transfers write to one block"
            read = [i for r in self._lent.values() for i in r.blocks]
            assert counts.quarantined <= len(written) + len(read), (counts, written, read)

    def _amounts(self, record: SequenceRecord) -> list[int]:
        amounts = [0] * len(self._prefixes)
        amounts[record.dp_rank] = len(record.blocks)
        return [*amounts, 1]

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _expected_tokens(self, reservation: Reservation) -> int:
        """Those generated elsewhere are prompt: what is expected begins anew behind them."""
        if self._expected_output_tokens is None:
            return reservation.max_tokens
        expected = reservation.prompt_tokens + self._expected_output_tokens
        return min(expected, reservation.max_tokens)

    def _lacks(self, record: SequenceRecord) -> bool:
        # The next step writes the KV of the latest token.
        return record.sampling.position > len(record.blocks) * self._block_size

    def _take_block(self, record: SequenceRecord) -> int:
        pool = self._of(record).pool
        [block] = pool.reserve(1)
        pool.mark_used([block])
        record.blocks.append(block)
        record.own_blocks.append(block)
        return block

    def _tell_of_room(self, record: SequenceRecord) -> None:
        if record.dp_rank in self._short:
            self._on_room()

    def _of(self, record: SequenceRecord) -> Prefixes:
        return self._prefixes[record.dp_rank]

    def _counts(self) -> BlockCounts:
        total: Counter[str] = Counter()
        for prefixes in self._prefixes:
            total.update(asdict(prefixes.pool.counts()))
        return BlockCounts(**total)

    def _start_if_ready(self, record: SequenceRecord) -> bool:
        if not record.kv_complete or record.last_token_id is None or record.handed_back:
            return False
        self._run(record)
        return True

    def _run(self, record: SequenceRecord) -> None:
        record.state = State.RUNNING
        self._of(record).pool.mark_used(record.blocks)

    def _close_writer(self, transfer_id: int) -> SequenceRecord | None:
        record = self._by_transfer.pop(transfer_id, None)
        if record is not None:
            self._of(record).pool.unpin(record.own_blocks)
            record.transfer.over.set_result(None)
            self._tell_of_room(record)
        return record

    def _remember(self, record: SequenceRecord) -> None:
        """Keep for others what has been written: all but the last token, whose step never came."""
        reservation = record.reservation
        known = reservation.known_ids
        if record.missing_tokens:
            known = known[: record.computed_tokens]
        self._of(record).remember(known, record.output[:-1], reservation.cache_salt, record.blocks)

    def _end(self, record: SequenceRecord) -> None:
        record.state = State.ENDED
        del self._by_request[record.request_id]
        self._on_end(record)
        if record.kv_complete or record.reservation.is_local:
            self._remember(record)
        self._of(record).pool.release(record.blocks)
        if not record.transfer.over.done():
            self._revoke(record.transfer.transfer_id)
        self._tell_of_room(record)
