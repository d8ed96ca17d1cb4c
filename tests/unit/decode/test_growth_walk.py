"""Whatever happens, sequences that grow into too few blocks all come to their end."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from decode.admission import Admission
from decode.compute import Done, Part, Rows
from decode.prefixes import Prefixes
from decode.refusals import NoRoom, StillOpen
from decode.scheduler import Scheduler
from decode.sequence import Reservation, SequenceRecord
from decode.worker import Step, Worker
from engine.blocks import BlockPool
from engine.prefix_cache import PrefixCache
from engine.sampling import Sampled, SamplingParams
from engine.stopping import StopCriteria
from service.prefix_keys import PrefixKeys

BLOCK_SIZE = 2
MOST_TRIES = 1 << 12


def next_token(tokens: Sequence[int]) -> int:
    """What the model says after these tokens: all of them matter."""
    return hash(tuple(tokens)) % 7


def answer(prompt: Sequence[int], length: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass(kw_only=True)
class Request:
    """A request as its router knows it; `attempt` is the id of the try that an instance has."""

    number: int
    prompt: list[int]
    max_new_tokens: int
    given: list[int] = field(default_factory=list)
    tries: int = 0
    attempt: int | None = None
    has_first: bool = False
    aborted: bool = False

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.given

    @property
    def over(self) -> bool:
        return self.aborted or len(self.given) == self.max_new_tokens


class Memory:
    """The cells of all blocks. What a step reads must be what was written for just these tokens."""

    def __init__(self) -> None:
        self._cells: dict[tuple[int, int, int], tuple[int, ...]] = {}

    def write(self, dp_rank: int, table: Sequence[int], place: int, tokens: Sequence[int]) -> None:
        cell = (dp_rank, table[place // BLOCK_SIZE], place % BLOCK_SIZE)
        self._cells[cell] = tuple(tokens[: place + 1])

    def check(self, dp_rank: int, table: Sequence[int], tokens: Sequence[int]) -> None:
        for place in range(len(tokens)):
            cell = (dp_rank, table[place // BLOCK_SIZE], place % BLOCK_SIZE)
            assert self._cells[cell] == tuple(tokens[: place + 1])


class Follower:
    """Steps that end when the walk says so, by tables of its own, as another rank has them."""

    def __init__(self, walk: "Walk", depth: int) -> None:
        self.depth = depth
        self._walk = walk
        self._tables: dict[int, list[int]] = {}
        self._under_way: list[tuple[Rows, Done]] = []

    def add(self, record: SequenceRecord) -> None:
        self._tables[record.request_id] = list(record.blocks)

    def grow(self, record: SequenceRecord, block: int) -> None:
        stepping = {row.request_id for rows, _ in self._under_way for of in rows for row in of}
        assert record.request_id not in stepping
        self._tables[record.request_id].append(block)

    def remove(self, request_id: int) -> None:
        del self._tables[request_id]

    def run(self, rows: Rows, done: Done) -> None:
        self._under_way.append((rows, done))

    def end_step(self) -> None:
        if not self._under_way:
            return
        rows, done = self._under_way.pop(0)
        parts = []
        for dp_rank, of_rank in enumerate(rows):
            sampled = []
            for row in of_rank:
                tokens = self._walk.tokens_of[row.request_id]
                table = self._tables[row.request_id]
                if row.length:
                    end = row.start + row.length
                    for place in range(row.start, end):
                        self._walk.memory.write(dp_rank, table, place, tokens)
                    self._walk.memory.check(dp_rank, table, tokens[:end])
                    if end == len(tokens):
                        tokens.append(next_token(tokens))
                        sampled.append(Sampled(token_id=tokens[-1]))
                    continue
                assert (row.start, row.token_id) == (len(tokens) - 1, tokens[-1])
                self._walk.memory.write(dp_rank, table, row.start, tokens)
                self._walk.memory.check(dp_rank, table, tokens)
                tokens.append(next_token(tokens))
                sampled.append(Sampled(token_id=tokens[-1]))
            parts.append(Part(sampled=sampled))
        done(parts)


class Walk:
    """A decode instance without a model, its transfers, and the router of all its requests."""

    def __init__(
        self,
        seed: int,
        *,
        blocks: int,
        expected: int,
        dp: int,
        depth: int,
        caches: bool,
        local: float,
    ) -> None:
        self._rng = random.Random(seed)
        self._local = local
        self._dp = dp
        self._most = blocks * BLOCK_SIZE
        self.compute = Follower(self, depth)
        self.memory = Memory()
        self.requests: list[Request] = []
        self.tokens_of: dict[int, list[int]] = {}
        self.handed_back: list[SequenceRecord] = []
        self._revoked: list[int] = []
        self._writers: dict[int, tuple[SequenceRecord, list[int]]] = {}
        self.admission = Admission(
            prefixes=[_prefixes(blocks, rank, caches) for rank in range(dp)],
            block_size=BLOCK_SIZE,
            max_sequences=5,
            expected_output_tokens=expected,
            revoke=self._revoked.append,
            on_end=lambda record: self.compute.remove(record.request_id),
            on_room=lambda: self.worker.room(),
        )
        self.worker = Worker(
            compute=self.compute,
            admission=self.admission,
            scheduler=Scheduler(max_batch=3, dp=dp, depth=depth, prompt_tokens=2),
            emit=self._emit,
            hand_back=self._hand_back,
            on_fatal=lambda error: None,
        )

    def _hand_back(self, record: SequenceRecord) -> None:
        others = [other for other in self.admission.all() if other.dp_rank == record.dp_rank]
        assert any(other.came < record.came for other in others), "the first must never go"
        self.handed_back.append(record)

    # ---- the router

    def ask(self) -> None:
        number = len(self.requests)
        prompt = [self._rng.randrange(2) for _ in range(self._rng.randint(1, 6))]
        longest = self._most - len(prompt)
        if longest >= 2:
            new = self._rng.randint(2, longest)
            self.requests.append(Request(number=number, prompt=prompt, max_new_tokens=new))

    def place(self, request: Request) -> None:
        """Begin a try where there is room; the last token is prefill's alone."""
        if request.over or request.attempt is not None:
            return
        if len(request.given) + 1 == request.max_new_tokens:
            request.given.append(next_token(request.tokens))
            return
        attempt = request.number * MOST_TRIES + request.tries
        try:
            record = self.admission.reserve(self._reservation(request, attempt))
        except NoRoom:
            return
        self.compute.add(record)
        self.tokens_of[attempt] = request.tokens
        request.tries, request.attempt = request.tries + 1, attempt
        request.has_first = record.reservation.is_local
        if not record.reservation.is_local:
            self._writers[record.transfer.transfer_id] = record, request.tokens
        elif self.admission.begin(attempt):
            self.worker.ready(attempt)

    def _reservation(self, request: Request, attempt: int) -> Reservation:
        return Reservation(
            request_id=attempt,
            router_id="r",
            prompt_tokens=len(request.tokens),
            prompt_ids=request.prompt,
            output_ids=list(request.given),
            sampling=SamplingParams(),
            stop=StopCriteria(max_new_tokens=request.max_new_tokens),
            ttl_s=60.0,
            dp_rank=self._rng.randrange(self._dp),
            came_us=request.number // 2,
            is_local=self._rng.random() < self._local,
        )

    def first_token(self, request: Request) -> None:
        """Prefill's token goes to the client and to decode; only once in a try."""
        attempt = request.attempt
        if attempt is None or request.has_first or not self.admission.holds(attempt):
            return
        request.has_first = True
        tokens = self.tokens_of[attempt]
        tokens.append(next_token(tokens))
        request.given.append(tokens[-1])
        if self.admission.activate(attempt, tokens[-1]):
            self.worker.ready(attempt)

    def abort(self, request: Request) -> None:
        request.aborted = True
        if request.attempt is not None:
            self._end(request.attempt)

    def _end(self, attempt: int) -> None:
        if not self.admission.end_unless_running(attempt):
            self.worker.abort(attempt)

    def _emit(self, step: Step) -> None:
        for token in step.tokens.get("r", ()):
            request = self.requests[token.request_id // MOST_TRIES]
            if request.attempt == token.request_id and not request.over:
                request.given.append(token.sampled.token_id)
                assert (token.finish is not None) is request.over

    def deliver_handed_back(self) -> None:
        if not self.handed_back:
            return
        record = self.handed_back.pop(0)
        request = self.requests[record.request_id // MOST_TRIES]
        if request.attempt == record.request_id:
            request.attempt = None
        self._end(record.request_id)

    # ---- transfers

    def write(self, transfer_id: int) -> None:
        """What a sender that is not known to be gone may do at any moment."""
        record, tokens = self._writers[transfer_id]
        for place in range(record.cached_tokens, len(tokens)):
            self.memory.write(record.dp_rank, record.blocks, place, tokens)

    def complete(self, transfer_id: int) -> None:
        self.write(transfer_id)
        del self._writers[transfer_id]
        if (record := self.admission.complete(transfer_id)) is not None:
            self.worker.ready(record.request_id)

    def fail(self, transfer_id: int) -> None:
        """Another transfer follows, if the sequence is still there."""
        record, tokens = self._writers.pop(transfer_id)
        self.admission.writer_closed(transfer_id)
        try:
            granted = self.admission.regrant(record.request_id)
        except (KeyError, StillOpen):
            return
        assert granted is record
        self._writers[record.transfer.transfer_id] = record, tokens

    def close_revoked(self) -> None:
        transfer_id = self._revoked.pop(0)
        if self._writers.pop(transfer_id, None) is not None:
            self.admission.writer_closed(transfer_id)

    # ---- the walk

    def any_move(self) -> None:
        move = self._rng.randrange(10)
        open_transfers = [t for t in self._writers if t not in self._revoked]
        if move == 0 and len(self.requests) < 12:
            self.ask()
        elif move == 1 and self.requests and self._rng.random() < 0.1:
            self.abort(self._rng.choice(self.requests))
        elif move == 2 and self.requests:
            self.place(self._rng.choice(self.requests))
        elif move == 3 and self.requests:
            self.first_token(self._rng.choice(self.requests))
        elif move == 4 and open_transfers:
            transfer_id = self._rng.choice(open_transfers)
            (self.fail if self._rng.random() < 0.2 else self.complete)(transfer_id)
        elif move == 5 and self._writers:
            self.write(self._rng.choice(list(self._writers)))
        elif move == 6 and self._revoked:
            self.close_revoked()
        elif move == 7:
            self.deliver_handed_back()
        elif move == 8:
            self.compute.end_step()
        else:
            self.worker.turn()

    def round(self) -> None:
        """All that is due happens, once."""
        for request in self.requests:
            self.place(request)
        for transfer_id in [t for t in self._writers if t not in self._revoked]:
            self.complete(transfer_id)
        for request in self.requests:
            self.first_token(request)
        while self._revoked:
            self.close_revoked()
        while self.handed_back:
            self.deliver_handed_back()
        self.worker.turn()
        self.compute.end_step()


def _prefixes(blocks: int, dp_rank: int, caches: bool) -> Prefixes:
    pool, cache = BlockPool(blocks), None
    if caches:
        cache = PrefixCache(pool, block_size=BLOCK_SIZE, keys=PrefixKeys(seed=b"walk"))
    return Prefixes(pool, cache=cache, layers=1, dp_rank=dp_rank)


@given(
    seed=st.integers(0, 2**32),
    blocks=st.integers(3, 10),
    expected=st.integers(1, 5),
    dp=st.integers(1, 2),
    depth=st.integers(1, 2),
    caches=st.booleans(),
    local=st.sampled_from((0.0, 0.5, 1.0)),
)
@settings(max_examples=150, deadline=None)
def test_every_sequence_ends_with_exactly_its_tokens(
    seed: int, blocks: int, expected: int, dp: int, depth: int, caches: bool, local: float
) -> None:
    walk = Walk(
        seed,
        blocks=blocks,
        expected=expected,
        dp=dp,
        depth=depth,
        caches=caches,
        local=local,
    )
    for _ in range(400):
        walk.any_move()
        walk.admission.check_integrity()
    owed = sum(r.max_new_tokens - len(r.given) for r in walk.requests)
    # In each round, but for some in which a block comes back, the first of all makes a token.
    # A prompt that is computed here, again after each time it was handed back, takes some as well.
    for _ in range(20 + 16 * owed):
        if all(request.over for request in walk.requests) and not walk.admission.held:
            break
        walk.round()
        walk.admission.check_integrity()
    for request in walk.requests:
        assert request.over
        assert request.given == answer(request.prompt, len(request.given))
    while walk._revoked:
        walk.close_revoked()
    counts = walk.admission.counts()
    assert counts.available == counts.total
