"""Which sequences the next decode step works on."""

from decode.scheduler import Scheduler


def test_sequences_join_up_to_the_batch_limit_in_order() -> None:
    scheduler = Scheduler(max_batch=2)
    for request_id in (1, 2, 3):
        scheduler.add(request_id)
    assert scheduler.schedule() == (1, 2)
    assert scheduler.waiting == 1


def test_place_of_an_ended_sequence_is_taken_at_the_next_step() -> None:
    scheduler = Scheduler(max_batch=2)
    for request_id in (1, 2, 3):
        scheduler.add(request_id)
    scheduler.schedule()
    scheduler.remove(1)
    assert scheduler.schedule() == (2, 3)


def test_sequence_removed_while_it_waits_never_runs() -> None:
    scheduler = Scheduler(max_batch=1)
    scheduler.add(1)
    scheduler.add(2)
    scheduler.schedule()
    scheduler.remove(2)
    scheduler.remove(1)
    assert scheduler.schedule() == ()
