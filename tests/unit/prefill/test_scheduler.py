"""Which prompt tokens the next step computes: one example or more for each rule."""

import math
from typing import Any

import pytest

from prefill.scheduler import Prompt, Scheduler, Slice, Step

ROOM = 10_000


def prompt(request_id: int, tokens: int, blocks: int = 1, **more: Any) -> Prompt:
    return Prompt(request_id=request_id, tokens=tokens, blocks=blocks, **more)


def given(step: Step) -> dict[int, int]:
    return {piece.request_id: piece.length for piece in step.slices}


def scheduler_of(*prompts: Prompt, budget: int = 80, **more: Any) -> Scheduler:
    scheduler = Scheduler(max_batched_tokens=budget, **more)
    for each in prompts:
        scheduler.add(each)
    return scheduler


# ---- chunks


def test_long_prompt_is_cut_into_chunks_of_the_budget() -> None:
    scheduler = scheduler_of(prompt(1, 200))
    steps = [scheduler.schedule(ROOM) for _ in range(4)]
    assert [step.slices for step in steps] == [
        (Slice(request_id=1, start=0, length=80),),
        (Slice(request_id=1, start=80, length=80),),
        (Slice(request_id=1, start=160, length=40),),
        (),
    ]


def test_short_prompts_share_a_step() -> None:
    scheduler = scheduler_of(*(prompt(i, 30) for i in range(3)))
    assert given(scheduler.schedule(ROOM)) == {0: 30, 1: 30, 2: 20}


def test_chunk_ends_with_a_block_unless_its_prompt_ends_there() -> None:
    scheduler = scheduler_of(prompt(1, 150), budget=100, block_size=16)
    pieces = [scheduler.schedule(ROOM).slices[0] for _ in range(2)]
    assert [(piece.start, piece.end) for piece in pieces] == [(0, 96), (96, 150)]


def test_tokens_that_make_no_block_go_to_a_prompt_that_they_finish() -> None:
    scheduler = scheduler_of(prompt(1, 150), prompt(2, 9), prompt(3, 4), budget=100, block_size=16)
    assert given(scheduler.schedule(ROOM)) == {1: 80, 2: 9, 3: 4}


def test_computing_starts_behind_the_cached_prefix_and_ends_its_first_chunk_with_a_block() -> None:
    scheduler = scheduler_of(prompt(1, 300), budget=100, block_size=16)
    step = scheduler.schedule(ROOM, enter=lambda _: 48)
    assert step.slices == (Slice(request_id=1, start=48, length=96),)


def test_step_works_on_a_bounded_number_of_prompts() -> None:
    scheduler = scheduler_of(*(prompt(i, 1) for i in range(5)), max_sequences=2)
    assert [len(scheduler.schedule(ROOM).slices) for _ in range(3)] == [2, 2, 1]


# ---- memory


def test_prompt_waits_until_its_blocks_are_free() -> None:
    scheduler = scheduler_of(prompt(1, 10, blocks=5))
    assert scheduler.schedule(4) == Step()
    assert (scheduler.waiting, scheduler.running) == (1, 0)
    assert scheduler.schedule(5).entering == (1,)


def test_blocks_are_not_promised_twice_within_a_step() -> None:
    scheduler = scheduler_of(prompt(1, 10, blocks=5), prompt(2, 10, blocks=5))
    assert scheduler.schedule(9).entering == (1,)


def test_prompt_enters_no_sooner_than_it_gets_tokens() -> None:
    scheduler = scheduler_of(prompt(1, 100), prompt(2, 100))
    assert scheduler.schedule(ROOM).entering == (1,)
    assert (scheduler.waiting, scheduler.running) == (1, 1)
    assert scheduler.schedule(ROOM).entering == (2,)


def test_prompt_that_does_not_fit_is_passed_only_so_often() -> None:
    scheduler = scheduler_of(
        prompt(0, 10, blocks=5), *(prompt(i, 40) for i in range(1, 9)), max_bypasses=3
    )
    assert [scheduler.schedule(4).entering for _ in range(3)] == [(1, 2), (3,), ()]
    assert scheduler.schedule(6).entering == (0, 4)


def test_what_holds_others_back_does_so_behind_another_that_does_not_fit() -> None:
    scheduler = scheduler_of(prompt(0, 10, blocks=5), prompt(1, 40), prompt(2, 40), max_bypasses=1)
    assert scheduler.schedule(4).entering == (1,)
    scheduler.add(prompt(3, 10, blocks=6, deadline_s=1.0))
    assert scheduler.schedule(4).entering == ()


def test_prompts_of_a_row_that_does_not_fit_are_each_passed_by_others() -> None:
    large = [prompt(i, 10, blocks=5, deadline_s=1.0 + i) for i in range(2)]
    scheduler = scheduler_of(*large, *(prompt(i, 80) for i in range(2, 9)), max_bypasses=2)
    entering = [scheduler.schedule(room).entering for room in (4, 4, 4, 5, 4, 4, 4)]
    assert entering == [(2,), (3,), (), (0,), (4,), (5,), ()]


def test_more_urgent_prompt_is_not_held_back_by_one_that_does_not_fit() -> None:
    scheduler = scheduler_of(prompt(0, 10, blocks=5), max_bypasses=0)
    scheduler.add(prompt(1, 10, priority=1))
    scheduler.add(prompt(2, 10))
    assert scheduler.schedule(4).entering == (1,)


def test_quick_prompt_is_held_back_like_any_other() -> None:
    scheduler = scheduler_of(prompt(0, 100, blocks=5), prompt(1, 5), max_bypasses=0)
    assert scheduler.schedule(4).entering == ()


# ---- order


def test_higher_priority_takes_all_that_it_wants() -> None:
    scheduler = scheduler_of(prompt(1, 80), prompt(2, 50, priority=1), prompt(3, 5))
    assert given(scheduler.schedule(ROOM)) == {2: 50, 1: 25, 3: 5}


def test_prompt_with_least_slack_goes_first() -> None:
    scheduler = scheduler_of(
        prompt(1, 80), prompt(2, 80, deadline_s=9.0), prompt(3, 80, deadline_s=8.0)
    )
    assert [list(given(scheduler.schedule(ROOM))) for _ in range(3)] == [[3], [2], [1]]


def test_slack_is_what_computing_leaves_of_the_time() -> None:
    rivals = prompt(1, 100, deadline_s=9.0), prompt(2, 1000, deadline_s=10.0)
    assert list(given(scheduler_of(*rivals).schedule(ROOM, now=0.0))) == [1]
    assert list(given(scheduler_of(*rivals).schedule(ROOM, 0.0, tokens_per_s=200.0))) == [2]


def test_prompt_that_will_be_late_in_any_case_does_not_make_others_late() -> None:
    rivals = prompt(1, 80, deadline_s=4.0), prompt(2, 80, deadline_s=7.0)
    assert list(given(scheduler_of(*rivals).schedule(ROOM, now=3.0))) == [1]
    assert list(given(scheduler_of(*rivals).schedule(ROOM, now=5.0))) == [2]


def test_of_equally_urgent_prompts_the_first_to_arrive_goes_first() -> None:
    scheduler = scheduler_of(*(prompt(i, 80, deadline_s=5.0) for i in (3, 1, 2)))
    assert [list(given(scheduler.schedule(ROOM))) for _ in range(3)] == [[3], [1], [2]]


# ---- long and short ones


def test_running_long_prompt_keeps_an_eighth_when_more_urgent_ones_come() -> None:
    scheduler = scheduler_of(prompt(1, 1000))
    scheduler.schedule(ROOM)
    scheduler.add(prompt(2, 100, deadline_s=1.0))
    assert given(scheduler.schedule(ROOM)) == {1: 10, 2: 70}


def test_of_two_running_prompts_the_one_that_entered_first_keeps_the_eighth() -> None:
    scheduler = scheduler_of(
        prompt(1, 1000, tenant="a"), prompt(2, 1000, tenant="b", deadline_s=9.0)
    )
    assert [given(scheduler.schedule(ROOM)) for _ in range(2)] == [{2: 80}, {2: 10, 1: 70}]
    scheduler.add(prompt(3, 1000, priority=1))
    assert given(scheduler.schedule(ROOM)) == {2: 10, 3: 70}


def test_eighth_is_whole_blocks_and_at_least_one() -> None:
    for budget, eighth in ((300, 32), (128, 16), (40, 16)):
        scheduler = scheduler_of(prompt(1, 1000), budget=budget, block_size=16)
        scheduler.schedule(ROOM)
        scheduler.add(prompt(2, 1000, priority=1))
        assert given(scheduler.schedule(ROOM))[1] == eighth


def test_urgent_long_prompts_do_not_block_a_quick_one() -> None:
    long = [prompt(i, 100_000, deadline_s=1.0) for i in (1, 2)]
    scheduler = scheduler_of(*long, prompt(3, 10), prompt(4, 11), prompt(5, 10))
    assert given(scheduler.schedule(ROOM)) == {1: 70, 3: 10}
    assert given(scheduler.schedule(ROOM)) == {1: 70, 5: 10}


def test_quick_prompt_does_not_go_ahead_of_a_higher_priority() -> None:
    scheduler = scheduler_of(prompt(1, 100, priority=1), prompt(2, 10))
    assert given(scheduler.schedule(ROOM)) == {1: 80}


# ---- starvation


def test_waiting_prompt_is_given_an_eighth_once_its_patience_ends() -> None:
    scheduler = scheduler_of(
        prompt(1, 25), *(prompt(i, 80, priority=1) for i in range(2, 20)), patience_steps=3
    )
    assert [given(scheduler.schedule(ROOM)).get(1, 0) for _ in range(7)] == [0, 0, 0, 10, 10, 5, 0]


def test_only_the_longest_entitled_prompt_is_given_an_eighth() -> None:
    scheduler = scheduler_of(
        prompt(1, 15), prompt(2, 15), prompt(3, 10_000, priority=1), patience_steps=0
    )
    steps = [given(scheduler.schedule(ROOM)) for _ in range(4)]
    assert [(step.get(1, 0), step.get(2, 0)) for step in steps] == [
        (10, 0),
        (5, 0),
        (0, 10),
        (0, 5),
    ]


def test_entitled_prompt_that_does_not_fit_holds_back_higher_priorities() -> None:
    scheduler = scheduler_of(prompt(1, 25, blocks=5), patience_steps=2, max_bypasses=1)
    entering = []
    for request_id in range(2, 8):
        scheduler.add(prompt(request_id, 80, priority=1))
        entering.append(scheduler.schedule(4).entering)
    assert entering == [(2,), (3,), (4,), (), (), ()]
    assert scheduler.schedule(5).entering == (1,)


# ---- tenants


def test_tenant_with_few_prompts_is_not_behind_one_with_many() -> None:
    scheduler = scheduler_of(*(prompt(i, 40, tenant="many") for i in range(20)))
    scheduler.add(prompt(99, 40, tenant="few"))
    assert given(scheduler.schedule(ROOM)) == {0: 40, 99: 40}


def test_deadlines_order_a_tenants_own_prompts_only() -> None:
    scheduler = scheduler_of(
        *(prompt(i, 40, tenant="hasty", deadline_s=1.0) for i in range(3)),
        *(prompt(i, 40, tenant="calm", deadline_s=20.0 - i) for i in range(3, 6)),
    )
    assert given(scheduler.schedule(ROOM)) == {0: 40, 5: 40}


def test_cached_tokens_are_not_charged() -> None:
    scheduler = scheduler_of(
        prompt(1, 90, tenant="a"),
        *(prompt(i, 40, tenant="b") for i in (2, 3)),
        prompt(4, 40, tenant="a"),
    )
    step = scheduler.schedule(ROOM, enter=lambda request_id: 60 if request_id == 1 else 0)
    assert given(step) == {1: 30, 2: 40, 4: 10}


def test_tenant_that_was_idle_gets_no_credit_for_it() -> None:
    scheduler = scheduler_of(prompt(0, 8000, tenant="busy"))
    for _ in range(20):
        scheduler.schedule(ROOM)
    scheduler.add(prompt(1, 8000, tenant="idle"))
    served = {0: 0, 1: 0}
    for _ in range(40):
        for request_id, tokens in given(scheduler.schedule(ROOM)).items():
            served[request_id] += tokens
    assert abs(served[0] - served[1]) <= 160


def test_priorities_are_fair_each_by_itself() -> None:
    scheduler = scheduler_of(*(prompt(i, 80, tenant="a", priority=1) for i in range(20)))
    scheduler.add(prompt(98, 40, tenant="a"))
    scheduler.add(prompt(99, 80, tenant="b"))
    for _ in range(20):
        scheduler.schedule(ROOM)
    assert list(given(scheduler.schedule(ROOM))) == [98, 99]


# ---- coming and going


def test_removed_prompt_is_computed_no_further() -> None:
    scheduler = scheduler_of(prompt(1, 300), prompt(2, 300))
    scheduler.schedule(ROOM)
    scheduler.remove(1)
    scheduler.remove(2)
    scheduler.remove(3)
    assert scheduler.schedule(ROOM) == Step()
    assert (scheduler.waiting, scheduler.running) == (0, 0)


def test_prompt_of_a_known_request_replaces_the_earlier_one() -> None:
    scheduler = scheduler_of(prompt(1, 300))
    scheduler.schedule(ROOM)
    scheduler.add(prompt(1, 20))
    assert scheduler.waiting == 1
    assert scheduler.schedule(ROOM).slices == (Slice(request_id=1, start=0, length=20),)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"tokens": 5, "blocks": -1},
        {"tokens": 5, "deadline_s": math.nan},
    ],
)
def test_prompt_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tokens"):
        prompt(1, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batched_tokens": 15},
        {"max_sequences": 0},
        {"block_size": 0},
        {"max_bypasses": -1},
        {"patience_steps": -1},
    ],
)
def test_settings_under_which_nothing_would_be_computed_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        Scheduler(**{"max_batched_tokens": 16, "block_size": 16, **wrong})
