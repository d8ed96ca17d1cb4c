"""Which prompt tokens the next step computes."""

from hypothesis import given
from hypothesis import strategies as st

from prefill.scheduler import Prompt, Scheduler, Slice


def prompt(request_id: int, tokens: int, blocks: int = 1, priority: int = 0) -> Prompt:
    return Prompt(request_id=request_id, tokens=tokens, blocks=blocks, priority=priority)


def test_long_prompt_is_cut_into_chunks_of_the_budget() -> None:
    scheduler = Scheduler(max_batched_tokens=100)
    scheduler.add(prompt(1, 250))
    steps = [scheduler.schedule(10) for _ in range(4)]
    assert [step.slices for step in steps] == [
        (Slice(request_id=1, start=0, length=100),),
        (Slice(request_id=1, start=100, length=100),),
        (Slice(request_id=1, start=200, length=50),),
        (),
    ]


def test_short_prompts_share_a_step() -> None:
    scheduler = Scheduler(max_batched_tokens=100)
    for request_id in (1, 2, 3):
        scheduler.add(prompt(request_id, 40))
    assert [s.length for s in scheduler.schedule(10).slices] == [40, 40, 20]


def test_prompt_waits_until_its_blocks_are_free() -> None:
    scheduler = Scheduler(max_batched_tokens=100)
    scheduler.add(prompt(1, 10, blocks=5))
    assert scheduler.schedule(4).entering == ()
    assert scheduler.waiting == 1
    assert scheduler.schedule(5).entering == (1,)


def test_prompt_that_does_not_fit_holds_back_the_shorter_ones_behind_it() -> None:
    scheduler = Scheduler(max_batched_tokens=100)
    scheduler.add(prompt(1, 10, blocks=5))
    scheduler.add(prompt(2, 10, blocks=1))
    assert scheduler.schedule(4).entering == ()


def test_higher_priority_goes_first() -> None:
    scheduler = Scheduler(max_batched_tokens=10)
    scheduler.add(prompt(1, 10))
    scheduler.add(prompt(2, 10, priority=1))
    assert [s.request_id for s in scheduler.schedule(10).slices] == [2]


def test_removed_prompt_is_computed_no_further() -> None:
    scheduler = Scheduler(max_batched_tokens=10)
    scheduler.add(prompt(1, 30))
    scheduler.schedule(10)
    scheduler.remove(1)
    assert scheduler.schedule(10).slices == ()
    assert scheduler.running == 0


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2)), min_size=1, max_size=20))
def test_every_token_of_every_prompt_is_computed_once_and_in_order(
    prompts: list[tuple[int, int]],
) -> None:
    scheduler = Scheduler(max_batched_tokens=64, max_sequences=4)
    for request_id, (tokens, priority) in enumerate(prompts):
        scheduler.add(prompt(request_id, tokens, priority=priority))
    computed = dict.fromkeys(range(len(prompts)), 0)
    while (step := scheduler.schedule(100)).slices:
        assert sum(piece.length for piece in step.slices) <= 64
        for piece in step.slices:
            assert piece.start == computed[piece.request_id]
            computed[piece.request_id] += piece.length
    assert computed == {i: tokens for i, (tokens, _) in enumerate(prompts)}
