"""Which sequences the next decode step works on."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from decode.scheduler import Scheduler, Step


def test_sequences_join_up_to_the_batch_limit_in_order() -> None:
    scheduler = Scheduler(max_batch=2)
    for request_id in (1, 2, 3):
        scheduler.add(request_id)
    assert scheduler.schedule() == ((1, 2),)
    assert scheduler.waiting == 1


def test_place_of_an_ended_sequence_is_taken_at_the_next_step() -> None:
    scheduler = Scheduler(max_batch=2)
    for request_id in (1, 2, 3):
        scheduler.add(request_id)
    scheduler.finished(scheduler.schedule())
    scheduler.remove(1)
    assert scheduler.schedule() == ((2, 3),)


def test_sequence_removed_while_it_waits_never_runs() -> None:
    scheduler = Scheduler(max_batch=1)
    scheduler.add(1)
    scheduler.add(2)
    scheduler.finished(scheduler.schedule())
    scheduler.remove(2)
    scheduler.remove(1)
    assert scheduler.schedule() == ()


def test_sequence_steps_again_only_when_its_step_is_over() -> None:
    scheduler = Scheduler(max_batch=4)
    scheduler.add(1)
    step = scheduler.schedule()
    assert step == ((1,),)
    assert scheduler.schedule() == ()
    scheduler.finished(step)
    assert scheduler.schedule() == ((1,),)


def test_steps_that_overlap_share_the_sequences() -> None:
    scheduler = Scheduler(max_batch=8, depth=2)
    for request_id in range(5):
        scheduler.add(request_id)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert (first, second) == (((0, 1, 2),), ((3, 4),))
    scheduler.finished(first)
    assert scheduler.schedule() == first


def test_dp_rank_without_sequences_is_in_the_step_all_the_same() -> None:
    scheduler = Scheduler(max_batch=2, dp=3)
    scheduler.add(7, 2)
    assert scheduler.schedule() == ((), (), (7,))


def test_prompt_is_computed_in_pieces_beside_the_others_tokens() -> None:
    scheduler = Scheduler(max_batch=4, prompt_tokens=8)
    scheduler.add(1)
    scheduler.add(2, missing_tokens=18)
    pieces = []
    for _ in range(4):
        step = scheduler.schedule()
        assert set(step[0]) == {1, 2}
        pieces.append((scheduler.piece(1), scheduler.piece(2)))
        scheduler.finished(step)
    assert pieces == [(0, 8), (0, 8), (0, 2), (0, 0)]


def test_step_has_pieces_of_several_prompts_up_to_its_bound_the_first_first() -> None:
    scheduler = Scheduler(max_batch=4, dp=2, prompt_tokens=8)
    for request_id, missing in ((1, 3), (2, 14), (3, 2)):
        scheduler.add(request_id, missing_tokens=missing)
    for request_id, missing in ((4, 8), (5, 0)):
        scheduler.add(request_id, 1, missing_tokens=missing)
    step = scheduler.schedule()
    assert step == ((1, 2), (5, 4))
    assert [scheduler.piece(request_id) for request_id in (1, 2, 3, 4)] == [3, 5, 0, 8]
    scheduler.finished(step)
    # The first is decoding by now, and so is the fourth.
    assert scheduler.schedule() == ((1, 2), (5, 4))
    assert [scheduler.piece(request_id) for request_id in (1, 2, 3, 4)] == [0, 8, 0, 0]


def test_pieces_are_larger_where_no_sequence_waits_for_them() -> None:
    scheduler = Scheduler(max_batch=4, dp=2, prompt_tokens=8)
    scheduler.add(1, missing_tokens=90)
    scheduler.finished(scheduler.schedule())
    scheduler.add(2, 1)
    sizes = []
    for _ in range(2):
        step = scheduler.schedule()
        sizes.append(scheduler.piece(1))
        scheduler.finished(step)
    scheduler.remove(2)
    scheduler.schedule()
    assert [*sizes, scheduler.piece(1)] == [8, 8, 32]


def test_prompts_take_no_part_of_the_share_of_an_overlapping_step() -> None:
    scheduler = Scheduler(max_batch=8, depth=2, prompt_tokens=8)
    for request_id in (1, 2):
        scheduler.add(request_id)
    scheduler.add(3, missing_tokens=20)
    assert (scheduler.schedule(), scheduler.schedule()) == (((1, 3),), ((2,),))


def test_prompt_of_a_sequence_that_must_not_step_is_not_computed() -> None:
    scheduler = Scheduler(max_batch=4, prompt_tokens=8)
    scheduler.add(1, missing_tokens=20)
    assert scheduler.schedule(without=(1,)) == ()
    assert scheduler.schedule() == ((1,),)


def test_step_as_a_whole_has_a_bound_where_all_prompts_are_computed_here() -> None:
    scheduler = Scheduler(max_batch=6, step_tokens=8)
    for request_id in (1, 2, 3):
        scheduler.add(request_id)
    for request_id, missing in ((4, 7), (5, 4), (6, 9)):
        scheduler.add(request_id, missing_tokens=missing)
    steps = []
    for _ in range(5):
        step = scheduler.schedule()
        steps.append([(r, scheduler.piece(r)) for r in step[0]])
        scheduler.finished(step)
    running = [(1, 0), (2, 0), (3, 0)]
    assert steps == [
        [*running, (4, 5)],
        [*running, (4, 2), (5, 3)],
        [*running, (4, 0), (5, 1), (6, 3)],
        [*running, (4, 0), (5, 0), (6, 3)],
        [*running, (4, 0), (5, 0), (6, 3)],
    ]


def test_chunk_is_no_larger_where_nothing_else_runs() -> None:
    scheduler = Scheduler(max_batch=4, step_tokens=8)
    scheduler.add(1, missing_tokens=90)
    scheduler.schedule()
    assert scheduler.piece(1) == 8


def test_prompt_is_asked_about_once_when_its_first_piece_is_due() -> None:
    scheduler = Scheduler(max_batch=4, step_tokens=8)
    scheduler.add(1, missing_tokens=12)
    scheduler.add(2, missing_tokens=30)
    missing, asked, pieces = {1: 12, 2: 3}, [], []

    def enter(request_id: int) -> int:
        asked.append(request_id)
        return missing[request_id]

    for _ in range(3):
        step = scheduler.schedule(enter=enter)
        pieces.append((list(asked), scheduler.piece(1), scheduler.piece(2)))
        scheduler.finished(step)
    assert pieces == [([1], 8, 0), ([1, 2], 4, 3), ([1, 2], 0, 0)]


class Random(RuleBasedStateMachine):
    """Every sequence steps as long as it is there, in one step at a time, and none is forgotten."""

    depth = 2

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = self.make()
        self.alive: dict[int, int] = {}
        self.missing: dict[int, int] = {}
        self.under_way: list[Step] = []
        self.next_id = 0

    def make(self) -> Scheduler:
        return Scheduler(max_batch=3, dp=2, depth=2, prompt_tokens=4)

    def check_pieces(self, dp_rank: int, pieces: dict[int, int]) -> None:
        assert sum(pieces.values()) <= 16

    @rule(dp_rank=st.integers(0, 1), missing=st.integers(0, 9))
    def add(self, dp_rank: int, missing: int) -> None:
        self.next_id += 1
        self.alive[self.next_id] = dp_rank
        self.missing[self.next_id] = missing
        self.scheduler.add(self.next_id, dp_rank, missing)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        stepping = {r for step in self.under_way for of_rank in step for r in of_rank}
        if idle := sorted(self.alive.keys() - stepping):
            request_id = data.draw(st.sampled_from(idle))
            del self.alive[request_id]
            self.scheduler.remove(request_id)

    @rule()
    def schedule(self) -> None:
        if len(self.under_way) == self.depth:
            return
        step = self.scheduler.schedule()
        stepping = {r for other in self.under_way for of_rank in other for r in of_rank}
        for dp_rank, of_rank in enumerate(step):
            assert len(set(of_rank)) == len(of_rank) <= 3
            assert not stepping.intersection(of_rank)
            assert all(self.alive[r] == dp_rank for r in of_rank)
            pieces = {r: self.scheduler.piece(r) for r in of_rank}
            self.check_pieces(dp_rank, pieces)
            assert all((piece > 0) is (self.missing[r] > 0) for r, piece in pieces.items())
            assert all(piece <= self.missing[r] for r, piece in pieces.items())
        if step:
            self.under_way.append(step)
        else:
            assert stepping or not self.alive

    @rule()
    def finish(self) -> None:
        if self.under_way:
            step = self.under_way.pop(0)
            for request_id in (r for of_rank in step for r in of_rank):
                self.missing[request_id] -= self.scheduler.piece(request_id)
            self.scheduler.finished(step)

    @invariant()
    def counts_agree(self) -> None:
        assert self.scheduler.running + self.scheduler.waiting == len(self.alive)


TestRandom = Random.TestCase
TestRandom.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class RandomColocated(Random):
    """No step is over its bound, none waits for prompts that decodes, and the first are first."""

    depth = 1

    def make(self) -> Scheduler:
        return Scheduler(max_batch=3, dp=2, step_tokens=5)

    def check_pieces(self, dp_rank: int, pieces: dict[int, int]) -> None:
        assert sum(max(1, piece) for piece in pieces.values()) <= 5
        batch = [r for r, rank in self.alive.items() if rank == dp_rank][:3]
        prompts = [r for r in batch if self.missing[r] > 0]
        begun = [r for r in prompts if r in pieces]
        assert {r for r in batch if r not in prompts} <= pieces.keys()
        assert begun == prompts[: len(begun)]
        assert bool(begun) is bool(prompts)
        # All but the last of them have all that they lack.
        assert all(pieces[r] == self.missing[r] for r in begun[:-1])


TestRandomColocated = RandomColocated.TestCase
TestRandomColocated.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
