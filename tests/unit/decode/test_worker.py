"""The step loop: whose tokens go out, and when a sequence that is in a step may end."""

import threading
import time
from collections.abc import Callable, Sequence

import pytest

from decode.admission import Admission
from decode.compute import Done, Part, Row, Rows
from decode.prefixes import Prefixes
from decode.scheduler import Scheduler
from decode.sequence import Reservation, SequenceRecord
from decode.worker import Step, Worker
from engine.blocks import BlockPool
from engine.sampling import Sampled, SamplingParams
from engine.stopping import StopCriteria
from service.hung_steps import StepHangs

WAIT_S = 5.0
PROMPT_TOKENS = 5


class Controlled:
    """A compute whose steps end when the test says so: the next token is the latest plus one."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.begun: list[Rows] = []
        self.removed: list[int] = []
        self._done: list[tuple[Rows, Done]] = []
        self._changed = threading.Condition()

    def add(self, record: object) -> None:
        pass

    def grow(self, record: object, block: int) -> None:
        pass

    def remove(self, request_id: int) -> None:
        self.removed.append(request_id)

    def run(self, rows: Rows, done: Done) -> None:
        with self._changed:
            self.begun.append(rows)
            self._done.append((rows, done))
            self._changed.notify_all()

    def wait_begun(self, steps: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= steps, WAIT_S)

    def end_step(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: bool(self._done), WAIT_S)
            rows, done = self._done.pop(0)
        done([Part(sampled=[s for r in of if (s := _sampled(r)) is not None]) for of in rows])


def _sampled(row: Row) -> Sampled | None:
    if not row.length:
        return Sampled(token_id=row.token_id + 1)
    is_last = row.start + row.length == PROMPT_TOKENS
    return Sampled(token_id=100 * row.request_id) if is_last else None


class System:
    """A worker with everything but a model."""

    def __init__(self, depth: int = 1, dp: int = 1) -> None:
        self.compute = Controlled(depth)
        self.admission = Admission(
            prefixes=[Prefixes(BlockPool(64), layers=2) for _ in range(dp)],
            block_size=4,
            max_sequences=16,
            revoke=lambda _: None,
            on_end=lambda record: self.compute.remove(record.request_id),
        )
        self.steps: list[Step] = []
        self.fatal: list[BaseException] = []
        self.handed_back: list[SequenceRecord] = []
        # Each sequence that has paused, and its tokens by then.
        self.paused: list[tuple[int, list[int]]] = []
        self._emitted = threading.Condition()
        self.worker = Worker(
            compute=self.compute,
            admission=self.admission,
            scheduler=Scheduler(max_batch=8, dp=dp, depth=depth, prompt_tokens=3),
            emit=self._emit,
            hand_back=self.handed_back.append,
            on_fatal=self.fatal.append,
            on_paused=self._pause,
        )

    def _pause(self, record: SequenceRecord) -> None:
        with self._emitted:
            self.paused.append((record.request_id, list(record.output)))
            self._emitted.notify_all()

    def _emit(self, step: Step) -> None:
        with self._emitted:
            self.steps.append(step)
            self._emitted.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._emitted:
            assert self._emitted.wait_for(condition, WAIT_S)

    def run(
        self, request_id: int, max_new_tokens: int = 4, router_id: str = "r", dp_rank: int = 0
    ) -> None:
        record = self.admission.reserve(
            Reservation(
                request_id=request_id,
                router_id=router_id,
                prompt_tokens=PROMPT_TOKENS,
                prompt_ids=(),
                sampling=SamplingParams(),
                stop=StopCriteria(max_new_tokens=max_new_tokens),
                ttl_s=60,
                dp_rank=dp_rank,
            )
        )
        self.admission.activate(request_id, 100 * request_id)
        self.admission.complete(record.transfer.transfer_id)
        self.worker.ready(request_id)

    def compute_and_run(self, request_id: int, max_new_tokens: int = 4) -> None:
        self.admission.reserve(
            Reservation(
                request_id=request_id,
                router_id="r",
                prompt_tokens=PROMPT_TOKENS,
                prompt_ids=range(PROMPT_TOKENS),
                sampling=SamplingParams(),
                stop=StopCriteria(max_new_tokens=max_new_tokens),
                ttl_s=60,
                is_local=True,
            )
        )
        assert self.admission.begin(request_id)
        self.worker.ready(request_id)

    def tokens(self, request_id: int) -> list[int]:
        return [
            token.sampled.token_id
            for step in self.steps
            for of_router in step.tokens.values()
            for token in of_router
            if token.request_id == request_id
        ]


@pytest.fixture
def system() -> System:
    return System()


def finish(system: System, steps: int) -> None:
    for number in range(steps):
        system.compute.end_step()
        system.wait(lambda number=number: len(system.steps) > number)  # type: ignore[misc]
    system.worker.stop()
    assert not system.fatal
    system.admission.check_integrity()


def test_tokens_go_to_their_router_until_the_last(system: System) -> None:
    system.run(1)
    system.run(2, max_new_tokens=3, router_id="other")
    system.worker.start()
    finish(system, 3)
    assert system.tokens(1) == [101, 102, 103]
    assert system.tokens(2) == [201, 202]
    assert [sorted(step.tokens) for step in system.steps] == [["other", "r"], ["other", "r"], ["r"]]
    assert system.admission.held == 0


def test_rows_say_what_is_in_the_cache(system: System) -> None:
    system.run(1)
    system.worker.start()
    finish(system, 3)
    rows: Sequence[Rows] = system.compute.begun
    assert [tuple(of[0][0]) for of in rows] == [(1, 100, 5, 0), (1, 101, 6, 0), (1, 102, 7, 0)]


def test_each_dp_rank_steps_with_its_own() -> None:
    system = System(dp=2)
    system.run(1, max_new_tokens=3)
    system.run(2, max_new_tokens=2, dp_rank=1)
    system.worker.start()
    finish(system, 2)
    rows = [[[row.request_id for row in of] for of in step] for step in system.compute.begun]
    assert rows == [[[1], [2]], [[1], []]]
    assert (system.tokens(1), system.tokens(2)) == ([101, 102], [201])


@pytest.mark.parametrize("depth", [1, 2])
def test_sequence_aborted_in_its_step_keeps_its_blocks_until_the_end(depth: int) -> None:
    system = System(depth)
    for request_id in (1, 2, 3, 4):
        system.run(request_id, max_new_tokens=2)
    system.worker.start()
    system.compute.wait_begun(depth)
    system.worker.abort(1)
    system.run(5, max_new_tokens=2)  # proves that the loop has seen the abort, with depth 2
    assert system.admission.holds(1)
    finish(system, 2 if depth == 1 else 3)
    assert system.tokens(1) == []
    assert [system.tokens(r) for r in (2, 3, 4, 5)] == [[201], [301], [401], [501]]
    assert sorted(system.compute.removed) == [1, 2, 3, 4, 5]
    assert system.admission.held == 0


def test_abort_between_steps_ends_at_once(system: System) -> None:
    system.run(1, max_new_tokens=50)
    system.worker.start()
    system.compute.wait_begun(1)
    system.compute.end_step()
    system.wait(lambda: len(system.steps) == 1)
    system.compute.wait_begun(2)
    system.worker.abort(1)
    system.run(2, max_new_tokens=2)
    system.compute.end_step()
    system.wait(lambda: len(system.steps) == 2)
    system.compute.end_step()
    system.wait(lambda: len(system.steps) == 3)
    system.worker.stop()
    assert system.tokens(1) == [101]
    assert system.tokens(2) == [201]


def test_error_of_a_step_brings_the_instance_down(system: System) -> None:
    system.run(1)

    def broken(rows: Rows, done: Done) -> None:
        raise RuntimeError("no step")

    system.compute.run = broken  # type: ignore[method-assign]
    system.worker.start()
    system.wait(lambda: True)
    system.worker._thread.join(WAIT_S)
    assert [str(error) for error in system.fatal] == ["no step"]


@pytest.mark.parametrize("depth", [1, 2])
def test_paused_sequence_leaves_after_the_step_under_way_and_others_go_on(depth: int) -> None:
    system = System(depth)
    system.run(1, max_new_tokens=9)
    system.run(2, max_new_tokens=9)
    system.worker.start()
    system.compute.wait_begun(depth)
    system.worker.pause(1)
    for _ in range(4):
        system.compute.end_step()
    system.wait(lambda: len(system.steps) >= 4)
    assert system.paused == [(1, [100, 101])]
    assert system.tokens(1) == [101]
    assert len(system.tokens(2)) >= 3
    system.worker.resume(1)
    while 102 not in system.tokens(1):
        done = len(system.steps)
        system.compute.end_step()
        system.wait(lambda done=done: len(system.steps) > done)  # type: ignore[misc]
    system.worker.stop()
    assert not system.fatal
    system.admission.check_integrity()


def test_sequence_that_ends_in_its_step_does_not_pause(system: System) -> None:
    system.run(1, max_new_tokens=2)
    system.run(2, max_new_tokens=9)
    system.worker.start()
    system.compute.wait_begun(1)
    system.worker.pause(1)
    system.worker.abort(2)
    finish(system, 1)
    assert system.tokens(1) == [101]
    assert system.paused == []
    assert system.admission.held == 0


def test_paused_sequence_may_be_aborted(system: System) -> None:
    system.run(1, max_new_tokens=9)
    system.worker.start()
    system.compute.wait_begun(1)
    system.worker.pause(1)
    system.compute.end_step()
    system.wait(lambda: bool(system.paused))
    system.worker.abort(1)
    system.worker.resume(1)  # too late, and of no effect
    system.run(2, max_new_tokens=2)
    system.compute.end_step()
    system.wait(lambda: bool(system.tokens(2)))
    finish(system, 0)
    assert system.tokens(1) == [101]
    assert system.admission.held == 0


def test_prompt_is_computed_here_before_its_sequence_goes_on(system: System) -> None:
    system.run(1, max_new_tokens=5)
    system.compute_and_run(2, max_new_tokens=3)
    system.worker.start()
    finish(system, 4)
    rows = [[tuple(row[1:]) for row in of[0] if row.request_id == 2] for of in system.compute.begun]
    assert rows == [[(0, 0, 3)], [(0, 3, 2)], [(200, 5, 0)], [(201, 6, 0)]]
    assert system.tokens(1) == [101, 102, 103, 104]
    assert system.tokens(2) == [200, 201, 202]
    firsts = [t.first for step in system.steps for t in step.tokens["r"] if t.request_id == 2]
    assert [first is not None for first in firsts] == [True, False, False]
    assert [step.prompt_tokens for step in system.steps] == [3, 2, 0, 0]
    assert system.admission.held == 0


def test_first_token_may_be_the_last_of_a_prompt_that_is_computed_here(system: System) -> None:
    system.compute_and_run(2, max_new_tokens=1)
    system.worker.start()
    finish(system, 1)
    [token] = system.steps[0].tokens["r"]
    assert (token.sampled.token_id, token.finish) == (200, "length")
    assert system.admission.held == 0


@pytest.mark.parametrize("steps", [1, 2])
def test_sequence_aborted_in_mid_prompt_ends_with_its_step(system: System, steps: int) -> None:
    system.compute_and_run(1)
    system.run(2, max_new_tokens=6)
    system.worker.start()
    for _ in range(steps - 1):
        system.compute.end_step()
    system.compute.wait_begun(steps)
    assert not system.admission.end_unless_running(1)
    system.worker.abort(1)
    assert system.admission.holds(1)
    finish(system, steps)
    assert system.tokens(1) == []
    assert system.compute.removed == [1]


def test_sequence_that_is_to_pause_in_mid_prompt_is_handed_back(system: System) -> None:
    system.compute_and_run(1)
    system.run(2, max_new_tokens=6)
    system.worker.start()
    system.compute.wait_begun(1)
    system.worker.pause(1)
    finish(system, 1)
    assert [record.request_id for record in system.handed_back] == [1]
    assert system.paused == []
    assert not system.admission.holds(1)


def test_step_under_way_is_told_until_it_ends(system: System) -> None:
    assert system.worker.step_under_way is None
    system.run(1, max_new_tokens=3)
    system.worker.start()
    for number in range(2):
        system.compute.wait_begun(number + 1)
        system.wait(lambda number=number: system.worker.step_under_way == number)  # type: ignore[misc]
        system.compute.end_step()
        system.wait(lambda number=number: len(system.steps) > number)  # type: ignore[misc]
    assert system.worker.step_under_way is None
    finish(system, 0)


def test_worker_that_cannot_stop_is_broken(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.hung_steps._LAST_STEP_S", 0.05)
    released = threading.Event()
    monkeypatch.setattr(system.compute, "run", lambda rows, done: released.wait(WAIT_S))
    system.run(1)
    system.worker.start()
    while system.worker.step_under_way is None:
        time.sleep(0.001)
    system.worker.stop()
    assert [type(error) for error in system.fatal] == [StepHangs]
    released.set()
