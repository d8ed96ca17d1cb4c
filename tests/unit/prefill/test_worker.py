"""A prompt's blocks live until its transfer has ended, whatever becomes of the request."""

import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.blocks import BlockPool
from engine.cache_memory import CacheItself
from engine.prefix_cache import PrefixCache
from engine.ring import CommError
from engine.runner import Chunk
from engine.sampling import SamplingParams
from engine.stopping import StopCriteria
from kvtransfer import Closed, Completed, Failed, KVShape, Span, TransferStats, uniform_cache
from kvtransfer.errors import PeerLost
from prefill.compute import RankCompute, Steps, layers_at_once
from prefill.handoff import Handoff
from prefill.records import FirstToken, Outcome, Request, RequestFailed, StepReport, Transferred
from prefill.scheduler import Scheduler
from prefill.worker import Worker
from service.peers import Grant
from service.prefix_keys import PrefixKeys

BLOCKS = 8
LAYOUT = uniform_cache((KVShape(layers=2, kv_heads=1, head_size=8, dtype="float32"),), 4)
CACHE: Any = SimpleNamespace(tensor=torch.zeros(1), layers=range(2))


class FakeRunner:
    """Answers token 3 to everything; can be told to break, and to take its time in later stages."""

    deterministic = False
    block_tokens = 4
    broken = False
    lost = False
    later: threading.Semaphore | None = None

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.chunks: list[Chunk] = []

    def start(
        self, chunks: Sequence[Chunk], on_layer: Callable[[int], None] | None = None
    ) -> "FakeLogits":
        assert self.gate.wait(10)
        self.chunks += chunks
        if self.broken:
            raise RuntimeError("the device is gone")
        for layer in range(2):
            if on_layer is not None:
                on_layer(layer)
        return FakeLogits(len(chunks), self.later, self.lost)

    def local_blocks(self, table: Sequence[int]) -> Sequence[int]:
        return table


class FakeLogits:
    """Says token 3 for each of some chunks, once the gate is open."""

    def __init__(self, chunks: int, gate: threading.Semaphore | None, lost: bool) -> None:
        self._chunks = chunks
        self._gate = gate
        self._lost = lost

    def wait(self) -> torch.Tensor:
        if self._lost:
            raise CommError("the last stage is gone")
        if self._gate is not None:
            assert self._gate.acquire(timeout=10)
        return torch.nn.functional.one_hot(torch.tensor([3] * self._chunks), 8).float()


class FakeAgent:
    """Takes transfers and never ends one by itself."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ready_layers: list[Span] = []
        self.ready_spans: list[tuple[int, Span, Span]] = []
        self.aborted: list[int] = []

    def begin(self, transfer: Any) -> None:
        self.begun.append(transfer.transfer_id)

    def ready(self, transfer_id: int, layers: Span, tokens: Span) -> None:
        self.ready_layers.append(layers)
        self.ready_spans.append((transfer_id, layers, tokens))

    def abort(self, transfer_id: int) -> None:
        self.aborted.append(transfer_id)


class Bench:
    """A worker with its surroundings, and what it emitted."""

    def __init__(self, depth: int = 1) -> None:
        self.agent = FakeAgent()
        self.runner = FakeRunner()
        self.pool = BlockPool(BLOCKS)
        self.cache = PrefixCache(self.pool, block_size=4, keys=PrefixKeys(seed=b"x"))
        self.handoff = Handoff(self.agent, layers=2)  # type: ignore[arg-type]
        self.outcomes: list[tuple[int, Outcome]] = []
        self.fatal: list[BaseException] = []
        self.steps: list[StepReport] = []
        self._changed = threading.Condition()
        self.worker = Worker(
            compute=Steps(
                RankCompute(
                    self.runner,  # type: ignore[arg-type]
                    CacheItself(CACHE),
                    LAYOUT.groups[0].shape,
                    range(2),
                    self.handoff,
                ),
                depth=depth,
                on_fatal=self.fatal.append,
            ),
            block_tokens=4,
            pool=self.pool,
            cache=self.cache,
            scheduler=Scheduler(max_batched_tokens=16),
            transfers=self.handoff,
            emit=self._emit,
            on_step=self.steps.append,
            on_fatal=self.fatal.append,
        )
        self.worker.start()

    def _emit(self, request_id: int, outcome: Outcome) -> None:
        with self._changed:
            self.outcomes.append((request_id, outcome))
            self._changed.notify()

    def submit(self, request_id: int, tokens: int = 10, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "prompt": [1] * tokens,
            "sampling": SamplingParams(),
            "stop": StopCriteria(max_new_tokens=5),
            "ttl_s": 30.0,
            **changes,
        }
        request = Request(request_id=request_id, **fields)
        if request.transfer:
            self.handoff.expect(request_id)
        self.worker.submit(request)

    def grant(self, request_id: int) -> None:
        grant = Grant(
            transfer_id=100 + request_id,
            epoch=1,
            nonce=bytes(16),
            tokens=Span(0, 10),
            ttl_s=30.0,
            instance="decode",
            layout=LAYOUT,
        )
        self.handoff.grant(request_id, grant)

    def wait_outcomes(self, count: int) -> list[Outcome]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.outcomes) >= count, 10)
        return [outcome for _, outcome in self.outcomes]

    def wait(self, condition: Callable[[], bool]) -> None:
        for _ in range(500):
            if condition():
                return
            threading.Event().wait(0.01)
        raise AssertionError("not in time")

    def free(self) -> int:
        return self.worker.load().blocks.available


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.worker.stop()
    bench.pool.check_integrity()


def test_blocks_are_free_when_the_transfer_is_acknowledged(bench: Bench) -> None:
    bench.submit(1)
    bench.grant(1)
    assert isinstance(bench.wait_outcomes(1)[0], FirstToken)
    stats = TransferStats(bytes=5, messages=2, seconds=0.1, transport="loopback")
    bench.worker.transfer_event(Completed(101, stats))
    assert isinstance(bench.wait_outcomes(2)[1], Transferred)
    bench.wait(lambda: bench.free() == BLOCKS)


def test_abort_during_a_transfer_keeps_its_blocks_until_it_is_closed(bench: Bench) -> None:
    bench.submit(1)
    bench.grant(1)
    bench.wait_outcomes(1)
    bench.worker.abort(1)
    bench.wait(lambda: bench.agent.aborted == [101])
    assert bench.worker.load().blocks.quarantined == 3
    bench.worker.transfer_event(Closed(101))
    bench.wait(lambda: bench.free() == BLOCKS)


def test_abort_before_the_grant_frees_at_once(bench: Bench) -> None:
    bench.submit(1)
    bench.wait_outcomes(1)
    bench.wait(lambda: bench.free() < BLOCKS)
    bench.worker.abort(1)
    bench.wait(lambda: bench.free() == BLOCKS)
    bench.grant(1)
    assert bench.agent.begun == []


def test_failed_transfer_is_told_and_frees_its_blocks(bench: Bench) -> None:
    bench.submit(1)
    bench.grant(1)
    bench.wait_outcomes(1)
    bench.worker.transfer_event(Failed(101, PeerLost("gone"), retryable=True))
    failure = bench.wait_outcomes(2)[1]
    assert isinstance(failure, RequestFailed)
    assert (failure.reason, failure.retryable) == ("PeerLost", True)
    bench.wait(lambda: bench.free() == BLOCKS)


def test_request_without_a_grant_ends_at_its_deadline(bench: Bench) -> None:
    bench.submit(1, ttl_s=0.2)
    failure = bench.wait_outcomes(2)[1]
    assert isinstance(failure, RequestFailed)
    assert failure.reason == "DeadlineExceeded"
    bench.wait(lambda: bench.free() == BLOCKS)


def finish(bench: Bench, request_id: int) -> None:
    stats = TransferStats(bytes=5, messages=2, seconds=0.1, transport="loopback")
    bench.worker.transfer_event(Completed(100 + request_id, stats))


def test_known_beginning_is_sent_but_not_computed_again(bench: Bench) -> None:
    bench.submit(1, prompt=list(range(12)))
    bench.grant(1)
    bench.wait_outcomes(1)
    finish(bench, 1)
    bench.wait_outcomes(2)
    bench.submit(2, prompt=[*range(9), 99, 99, 99])
    bench.grant(2)
    bench.wait_outcomes(3)
    first, _, second = [outcome for _, outcome in bench.outcomes[:3]]
    assert isinstance(first, FirstToken)
    assert isinstance(second, FirstToken)
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)
    assert [(chunk.start, chunk.end) for chunk in bench.runner.chunks] == [(0, 12), (8, 12)]
    assert bench.runner.chunks[0].block_table[:2] == bench.runner.chunks[1].block_table[:2]
    assert bench.runner.chunks[0].block_table[2] != bench.runner.chunks[1].block_table[2]
    sent = {
        (layer, token)
        for transfer_id, layers, tokens in bench.agent.ready_spans
        if transfer_id == 102
        for layer in layers
        for token in tokens
    }
    assert sent == {(layer, token) for layer in range(2) for token in range(12)}
    finish(bench, 2)
    bench.wait(lambda: bench.free() == BLOCKS)
    bench.cache.check_integrity()


def test_requests_of_other_salts_share_nothing(bench: Bench) -> None:
    for request_id in (1, 2):
        bench.submit(request_id, prompt=list(range(8)), cache_salt=b"%d" % request_id)
        bench.grant(request_id)
        bench.wait_outcomes(2 * request_id - 1)
        finish(bench, request_id)
        bench.wait_outcomes(2 * request_id)
    assert [(chunk.start, chunk.end) for chunk in bench.runner.chunks] == [(0, 8), (0, 8)]


def test_prompt_that_is_known_whole_computes_its_last_block(bench: Bench) -> None:
    for request_id in (1, 2):
        bench.submit(request_id, prompt=list(range(8)))
        bench.grant(request_id)
        bench.wait_outcomes(2 * request_id - 1)
        finish(bench, request_id)
        bench.wait_outcomes(2 * request_id)
    assert [(chunk.start, chunk.end) for chunk in bench.runner.chunks] == [(0, 8), (4, 8)]


def test_cache_gives_way_to_new_prompts(bench: Bench) -> None:
    for request_id in range(1, 6):
        bench.submit(request_id, prompt=[request_id] * 20)
        bench.grant(request_id)
        bench.wait_outcomes(2 * request_id - 1)
        finish(bench, request_id)
        bench.wait_outcomes(2 * request_id)
    assert all(chunk.start in (0, 16) for chunk in bench.runner.chunks)
    bench.wait(lambda: bench.free() == BLOCKS)
    bench.cache.check_integrity()


def test_transfer_that_is_over_before_the_prompt_waits_for_the_first_token(bench: Bench) -> None:
    bench.runner.gate.clear()
    bench.submit(1, tokens=20)  # two steps
    bench.grant(1)
    bench.wait(lambda: bench.agent.begun == [101])
    stats = TransferStats(bytes=0, messages=0, seconds=0.0, transport="")
    bench.worker.transfer_event(Completed(101, stats))
    bench.runner.gate.set()
    first, done = bench.wait_outcomes(2)
    assert isinstance(first, FirstToken)
    assert isinstance(done, Transferred)
    bench.wait(lambda: bench.free() == BLOCKS)


def test_abort_after_an_early_end_of_the_transfer_frees_at_once(bench: Bench) -> None:
    bench.runner.gate.clear()
    bench.submit(1, tokens=20)
    bench.grant(1)
    bench.wait(lambda: bench.agent.begun == [101])
    stats = TransferStats(bytes=0, messages=0, seconds=0.0, transport="")
    bench.worker.transfer_event(Completed(101, stats))
    bench.worker.abort(1)
    bench.runner.gate.set()
    bench.wait(lambda: bench.free() == BLOCKS)
    assert bench.outcomes == []


def test_prompt_waits_for_the_blocks_of_another(bench: Bench) -> None:
    bench.submit(1, tokens=20)
    bench.grant(1)
    bench.wait_outcomes(2 - 1)
    bench.submit(2, tokens=20)
    bench.wait(lambda: bench.worker.load().waiting == 1)
    bench.worker.abort(1)
    bench.wait(lambda: bench.agent.aborted == [101])
    assert bench.worker.load().waiting == 1
    bench.worker.transfer_event(Closed(101))
    bench.wait_outcomes(2)
    assert [request_id for request_id, _ in bench.outcomes] == [1, 2]
    bench.worker.abort(2)


def test_answer_that_ends_with_its_first_token_is_not_transferred(bench: Bench) -> None:
    bench.submit(1, stop=StopCriteria(max_new_tokens=5, stop_token_ids=frozenset({3})))
    [first] = bench.wait_outcomes(1)
    assert isinstance(first, FirstToken)
    assert first.finish == "stop"
    bench.wait(lambda: bench.free() == BLOCKS)


@pytest.fixture
def staged() -> Iterator[Bench]:
    """Two stages; the logits of a step come when `later` is released."""
    bench = Bench(depth=2)
    bench.runner.later = threading.Semaphore(0)
    yield bench
    bench.runner.later.release(100)
    bench.worker.stop()
    bench.pool.check_integrity()


def test_as_many_steps_are_under_way_as_there_are_stages(staged: Bench) -> None:
    assert staged.runner.later is not None
    staged.submit(1, tokens=20, transfer=False)  # two steps
    staged.submit(2, tokens=10, transfer=False)
    staged.wait(lambda: len(staged.runner.chunks) >= 2)
    begun = len(staged.runner.chunks)
    assert staged.outcomes == []
    threading.Event().wait(0.05)
    assert len(staged.runner.chunks) == begun  # the third waits for a stage
    staged.runner.later.release(10)
    staged.wait_outcomes(2)
    assert sum(chunk.end - chunk.start for chunk in staged.runner.chunks) == 30
    assert sorted(request_id for request_id, _ in staged.outcomes) == [1, 2]
    staged.wait(lambda: staged.free() == BLOCKS)


def test_request_that_is_aborted_in_a_later_stage_leaves_nothing(staged: Bench) -> None:
    assert staged.runner.later is not None
    staged.submit(1, prompt=list(range(16)))
    staged.wait(lambda: len(staged.runner.chunks) == 1)
    staged.worker.abort(1)
    staged.wait(lambda: staged.free() == BLOCKS)
    staged.submit(2, prompt=list(range(100, 116)))
    staged.wait(lambda: len(staged.runner.chunks) == 2)
    assert staged.runner.chunks[0].block_table == staged.runner.chunks[1].block_table
    staged.runner.later.release(2)
    staged.wait_outcomes(1)
    assert [request_id for request_id, _ in staged.outcomes] == [2]
    staged.cache.check_integrity()
    # What the first one had computed is not known: its blocks are the second one's.
    assert staged.cache.match(list(range(16)), bytes(2)) == []
    assert len(staged.cache.match(list(range(100, 116)), bytes(2))) > 0
    staged.worker.abort(2)


def test_transfer_that_fails_in_the_middle_of_a_step_ends_the_request(bench: Bench) -> None:
    bench.runner.gate.clear()
    bench.submit(1, prompt=list(range(20)))  # two steps
    bench.grant(1)
    bench.wait(lambda: bench.agent.begun == [101])
    bench.worker.transfer_event(Failed(101, PeerLost("gone"), retryable=True))
    bench.runner.gate.set()
    [failure] = bench.wait_outcomes(1)
    assert isinstance(failure, RequestFailed)
    bench.wait(lambda: bench.free() == BLOCKS)
    assert bench.cache.match(list(range(20)), bytes(2)) == []
    assert bench.fatal == []


def test_lost_logits_are_fatal(staged: Bench) -> None:
    staged.runner.lost = True
    staged.submit(1)
    staged.wait(lambda: len(staged.fatal) == 1)


def test_broken_engine_is_reported_once(bench: Bench) -> None:
    bench.runner.broken = True
    bench.submit(1)
    bench.wait(lambda: len(bench.fatal) == 1)


@pytest.mark.parametrize(
    ("tokens", "layers"), [(1, 8), (512, 8), (1024, 4), (2048, 2), (4096, 1), (9999, 1)]
)
def test_layers_are_handed_over_in_groups_worth_a_message(tokens: int, layers: int) -> None:
    shape = KVShape(layers=8, kv_heads=2, head_size=32, dtype="bfloat16")
    assert layers_at_once(shape, tokens) == layers


def test_every_layer_is_handed_over_once(bench: Bench) -> None:
    bench.submit(1)
    bench.grant(1)
    bench.wait_outcomes(1)
    covered = [layer for span in bench.agent.ready_layers for layer in span]
    assert covered == list(range(LAYOUT.groups[0].shape.layers))
    bench.worker.transfer_event(Closed(101))


def test_each_step_is_told_with_its_tokens(bench: Bench) -> None:
    bench.submit(1, tokens=20, transfer=False)
    bench.wait_outcomes(1)
    bench.wait(lambda: len(bench.steps) == 2)
    assert [(step.tokens, step.max_tokens, step.prompts) for step in bench.steps] == [
        (16, 16, 1),
        (4, 16, 1),
    ]
    assert all(step.compute_s > 0 for step in bench.steps)


def test_tenants_are_computed_fairly_whoever_came_first(bench: Bench) -> None:
    """One queues ten prompts before another comes with two: its two are not the last."""
    bench.runner.gate.clear()
    for request_id in range(12):
        salt, tenant = b"%d" % request_id, "few" if request_id >= 10 else "many"
        bench.submit(request_id, tokens=16, transfer=False, tenant=tenant, cache_salt=salt)
    bench.runner.gate.set()
    bench.wait_outcomes(12)
    order = [request_id for request_id, _ in bench.outcomes]
    assert sorted(order) == list(range(12))
    assert max(order.index(10), order.index(11)) < 6


def test_sequence_from_elsewhere_goes_on_where_it_was(bench: Bench) -> None:
    sampling = SamplingParams(presence_penalty=2.0)
    moved: dict[str, Any] = {"prompt": [1, 1, 3, 2], "sampling": sampling, "transfer": False}
    stop = StopCriteria(max_new_tokens=3)
    bench.submit(1, **moved, stop=stop, output_tokens=2)
    bench.submit(2, **moved, stop=stop, output_tokens=1)
    bench.submit(3, **moved, stop=stop)
    bench.wait_outcomes(3)
    found = dict(bench.outcomes)
    firsts = [found[number] for number in (1, 2, 3)]
    assert [(f.sampled.token_id, f.finish) for f in firsts if isinstance(f, FirstToken)] == [
        (0, "length"),
        (3, None),
        (3, None),
    ]


def test_sequence_from_elsewhere_is_sampled_at_its_place(bench: Bench) -> None:
    count = 12
    for seed in range(count):
        flat = SamplingParams(temperature=50.0, seed=seed)
        bench.submit(seed, 4, sampling=flat, transfer=False)
        bench.submit(count + seed, 4, sampling=flat, transfer=False, output_tokens=2)
    bench.wait_outcomes(2 * count)
    chosen = {n: o.sampled.token_id for n, o in bench.outcomes if isinstance(o, FirstToken)}
    assert [chosen[n] for n in range(count)] == [chosen[count + n] for n in range(count)]
