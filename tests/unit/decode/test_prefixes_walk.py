"""Reuse under random histories: memory is played as well, so that a wrong write or read shows."""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode.admission import Admission
from decode.prefixes import Prefixes
from decode.refusals import NoRoom, StillOpen
from decode.sequence import Reservation, SequenceRecord, State
from engine.blocks import BlockPool
from engine.prefix_cache import PrefixCache
from engine.sampling import SamplingParams
from engine.stopping import StopCriteria
from service.prefix_keys import PrefixKeys

BLOCKS = 14
SIZE = 2
LAYERS = 2
REQUESTS = st.integers(0, 5)
# Mostly alike, so that answers become the beginnings of prompts.
TOKENS = st.sampled_from([0, 0, 0, 1])

# The KV of a token stands for its salt and for all tokens up to it.
Content = tuple[bytes, tuple[int, ...]]


@dataclass(eq=False)
class _Writer:
    """An open transfer; `arrived` of each layer's tokens are there."""

    record: SequenceRecord
    arrived: list[int]


class Reuse(RuleBasedStateMachine):
    """Prefill's transfers and decode's steps write what their tokens say, and all reads agree."""

    def __init__(self) -> None:
        super().__init__()
        self.revoked: set[int] = set()
        self.pool = BlockPool(BLOCKS)
        keys = PrefixKeys(seed=b"model")
        self.cache = PrefixCache(self.pool, block_size=SIZE, keys=keys)
        self.admission = Admission(
            prefixes=[Prefixes(self.pool, cache=self.cache, layers=LAYERS)],
            block_size=SIZE,
            max_sequences=5,
            revoke=self.revoked.add,
        )
        self.memory: dict[tuple[int, int, int], Content] = {}
        self.writers: dict[int, _Writer] = {}
        self.live: dict[int, SequenceRecord] = {}

    # ---- memory

    def content(self, record: SequenceRecord, position: int) -> Content:
        tokens = (*record.reservation.prompt_ids, *record.output)
        return record.reservation.cache_salt, tokens[: position + 1]

    def write(self, record: SequenceRecord, layer: int, position: int) -> None:
        block = record.blocks[position // SIZE]
        assert block not in self.pool.remembered(), "a block that others may share is written to"
        others = [r for r in self.live.values() if r is not record and block in r.blocks]
        assert not others, "a block of another sequence is written to"
        assert block not in self.pool.idle()
        self.memory[layer, block, position % SIZE] = self.content(record, position)

    def check(self, record: SequenceRecord, tokens: int) -> None:
        """The first `tokens` of a sequence are what they should be, in all layers."""
        for position in range(tokens):
            block, offset = record.blocks[position // SIZE], position % SIZE
            for layer in range(LAYERS):
                assert self.memory[layer, block, offset] == self.content(record, position)

    # ---- what happens

    @rule(
        request_id=REQUESTS,
        zeros=st.integers(1, 9),
        end=st.lists(st.integers(0, 1), max_size=2),
        salt=st.sampled_from([b"", b"", b"other"]),
        new=st.integers(2, 5),
    )
    def reserve(self, request_id: int, zeros: int, end: list[int], salt: bytes, new: int) -> None:
        prompt = (0,) * zeros + tuple(end)
        reservation = Reservation(
            request_id=request_id,
            router_id="r",
            prompt_tokens=len(prompt),
            prompt_ids=prompt,
            sampling=SamplingParams(),
            stop=StopCriteria(max_new_tokens=new),
            ttl_s=10.0,
            cache_salt=salt,
        )
        written = {i for writer in self.writers.values() for i in writer.record.own_blocks}
        try:
            record = self.admission.reserve(reservation)
        except (NoRoom, ValueError):
            return
        assert not set(record.blocks) & written, "a block is given away while it may be written to"
        self.live[request_id] = record
        self.check(record, record.cached_tokens)
        self.open(record)

    def open(self, record: SequenceRecord) -> None:
        of_layers = record.transfer.kept[0] if record.transfer.kept else (0,) * LAYERS
        assert min(of_layers) >= record.cached_tokens
        self.writers[record.transfer.transfer_id] = _Writer(record, list(of_layers))

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1), tokens=st.integers(1, 4))
    def arrive(self, data: st.DataObject, layer: int, tokens: int) -> None:
        """Also of a transfer whose request has ended: it is open until it is said to be closed."""
        writer = data.draw(st.sampled_from(list(self.writers.values())))
        self.bring(writer, layer, writer.arrived[layer] + tokens)

    def bring(self, writer: _Writer, layer: int, upto: int) -> None:
        upto = min(upto, writer.record.reservation.prompt_tokens)
        for position in range(writer.arrived[layer], upto):
            self.write(writer.record, layer, position)
        writer.arrived[layer] = max(upto, writer.arrived[layer])

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        transfer_id = data.draw(st.sampled_from(list(self.writers)))
        writer = self.writers[transfer_id]
        for layer in range(LAYERS):
            self.bring(writer, layer, writer.record.reservation.prompt_tokens)
        del self.writers[transfer_id]
        self.admission.complete(transfer_id)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), reports=st.booleans())
    def fail(self, data: st.DataObject, reports: bool) -> None:
        """A transfer need not say what has arrived."""
        transfer_id = data.draw(st.sampled_from(list(self.writers)))
        writer = self.writers.pop(transfer_id)
        self.admission.writer_closed(transfer_id, (tuple(writer.arrived),) if reports else ())

    @rule(request_id=REQUESTS)
    def regrant(self, request_id: int) -> None:
        try:
            record = self.admission.regrant(request_id)
        except (KeyError, StillOpen):
            return
        if record is not None:
            self.open(record)

    @rule(request_id=REQUESTS, token_id=TOKENS)
    def activate(self, request_id: int, token_id: int) -> None:
        self.admission.activate(request_id, token_id)

    @rule(request_id=REQUESTS, token_id=TOKENS)
    def step(self, request_id: int, token_id: int) -> None:
        record = self.live.get(request_id)
        if record is None or record.state is not State.RUNNING:
            return
        written = record.sampling.position - 1
        for layer in range(LAYERS):
            self.write(record, layer, written)
        self.check(record, written + 1)
        record.append(token_id)
        if len(record.output) == record.reservation.stop.max_new_tokens:
            self.end(request_id)

    @rule(request_id=REQUESTS)
    def end(self, request_id: int) -> None:
        self.live.pop(request_id, None)
        self.admission.end(request_id)

    # ---- what always holds

    @invariant()
    def books_agree(self) -> None:
        self.admission.check_integrity()
        available = self.pool.counts().available
        held = {i for record in self.live.values() for i in record.blocks}
        held |= {i for writer in self.writers.values() for i in writer.record.own_blocks}
        assert available == BLOCKS - len(held)

    @invariant()
    def what_is_held_is_unchanged(self) -> None:
        for record in self.live.values():
            prompt = record.reservation.prompt_tokens
            self.check(record, prompt if record.kv_complete else record.cached_tokens)

    def teardown(self) -> None:
        for request_id in list(self.live):
            self.end(request_id)
        open_ = {writer.record.transfer.transfer_id for writer in self.writers.values()}
        assert open_ <= self.revoked
        for transfer_id in list(self.writers):
            self.admission.writer_closed(transfer_id)
        assert self.admission.counts().available == BLOCKS


TestReuse = Reuse.TestCase
TestReuse.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
