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


class Random(RuleBasedStateMachine):
    """Every sequence steps as long as it is there, in one step at a time, and none is forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(max_batch=3, dp=2, depth=2)
        self.alive: dict[int, int] = {}
        self.under_way: list[Step] = []
        self.next_id = 0

    @rule(dp_rank=st.integers(0, 1))
    def add(self, dp_rank: int) -> None:
        self.next_id += 1
        self.alive[self.next_id] = dp_rank
        self.scheduler.add(self.next_id, dp_rank)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        stepping = {r for step in self.under_way for of_rank in step for r in of_rank}
        if idle := sorted(self.alive.keys() - stepping):
            request_id = data.draw(st.sampled_from(idle))
            del self.alive[request_id]
            self.scheduler.remove(request_id)

    @rule()
    def schedule(self) -> None:
        if len(self.under_way) == 2:
            return
        step = self.scheduler.schedule()
        stepping = {r for other in self.under_way for of_rank in other for r in of_rank}
        for dp_rank, of_rank in enumerate(step):
            assert len(set(of_rank)) == len(of_rank) <= 3
            assert not stepping.intersection(of_rank)
            assert all(self.alive[r] == dp_rank for r in of_rank)
        if step:
            self.under_way.append(step)
        else:
            assert stepping or not self.alive

    @rule()
    def finish(self) -> None:
        if self.under_way:
            self.scheduler.finished(self.under_way.pop(0))

    @invariant()
    def counts_agree(self) -> None:
        assert self.scheduler.running + self.scheduler.waiting == len(self.alive)


TestRandom = Random.TestCase
TestRandom.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
