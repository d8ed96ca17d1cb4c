"""What one request has come to over all its tries: ids, limits, and what goes on from where."""

from dataclasses import replace

from router.ledger import InstanceKey
from router.progress import TRY_BITS, Progress
from router.request import Sampling, Stats, Stop, Tokens, ValidRequest
from tests.unit.router.served import TOKENIZER

REQUEST = ValidRequest(
    prompt_token_ids=(1, 2, 3),
    sampling=Sampling(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        seed=None,
        logprobs=None,
    ),
    stop=Stop(max_new_tokens=1 << 20, min_new_tokens=0, strings=(), token_ids=(), ignore_eos=False),
    priority=0,
)
FIRST_ID = 5 << TRY_BITS


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(max_retries: int = 2, clock: Clock | None = None) -> Progress:
    return Progress(
        FIRST_ID, REQUEST, TOKENIZER, Stats(), max_retries=max_retries, clock=clock or Clock()
    )


def push(run: Progress, *token_ids: int) -> float | None:
    return run.push(Tokens(token_ids=token_ids))[1]


def test_request_goes_on_after_all_that_was_given() -> None:
    run = make()
    push(run, 7)
    push(run, 8, 9)
    assert run.go_on(by_decode=True)
    assert run.request == replace(REQUEST, prompt_token_ids=(1, 2, 3, 7, 8, 9), output_tokens=3)
    assert run.request.need.total_tokens == REQUEST.need.total_tokens
    push(run, 10)
    assert run.go_on(by_decode=False)
    assert run.request.prompt_token_ids == (1, 2, 3, 7, 8, 9, 10)
    assert (run.stats.moves, run.stats.retries) == (2, 0)


def test_last_token_needs_no_decode() -> None:
    stop = replace(REQUEST.stop, max_new_tokens=3)
    need = replace(REQUEST, stop=stop).after([4, 5]).need
    assert not need.decodes
    assert need.total_tokens == 6


def test_limit_counts_tries_and_resumes_since_decode_last_gave_tokens() -> None:
    run = make(max_retries=2)
    assert run.next_id() == FIRST_ID | 1
    assert run.go_on(by_decode=False) is False
    push(run, 7)
    assert run.go_on(by_decode=True)
    assert run.fruitless == 0
    assert run.next_id() is not None
    push(run, 8)
    assert run.go_on(by_decode=False)  # a token of prefill's: it moves, and counts all the same
    assert run.next_id() is None
    assert run.go_on(by_decode=False) is None
    assert (run.stats.moves, run.stats.retries) == (2, 3)


def test_try_that_was_refused_by_a_drain_does_not_count() -> None:
    run = make(max_retries=1)
    for _ in range(5):
        assert run.go_on(by_decode=False, is_failure=False) is False
    assert run.next_id() is not None
    assert run.next_id() is None


def test_ids_are_never_used_twice() -> None:
    run = make()
    ids = {run.id}
    while run.go_on(by_decode=True) is not None:
        ids.add(run.id)
    assert len(ids) == 1 << TRY_BITS
    assert {request_id >> TRY_BITS for request_id in ids} == {5}


def test_instances_that_failed_are_taken_again_after_progress() -> None:
    run = make()
    run.avoid = frozenset({InstanceKey("a", 1)})
    assert run.go_on(by_decode=False) is False
    assert run.avoid
    assert run.go_on(by_decode=True) is False
    assert not run.avoid


def test_pause_is_from_the_last_token_to_the_next() -> None:
    clock = Clock()
    run = make(clock=clock)
    assert push(run, 7) is None
    clock.now += 2
    assert push(run, 8) is None
    clock.now += 3
    run.go_on(by_decode=True)
    run.go_on(by_decode=False)
    clock.now += 4
    assert push(run, 9) == 7.0
    assert push(run, 10) is None
    assert run.stats.pause_s == 7.0


def test_carried_sequence_goes_on_from_its_last_token() -> None:
    clock = Clock()
    run = make(clock=clock)
    push(run, 7, 8)
    assert run.begin_carry() == FIRST_ID | 1
    push(run, 9)
    run.pause()
    assert run.cached == replace(REQUEST, prompt_token_ids=(1, 2, 3, 7, 8), output_tokens=2)
    assert run.last_token_id == 9
    run.carried()
    clock.now += 2
    assert push(run, 10) == 2
    assert (run.way, run.stats.moves, run.stats.retries) == ("kv", 1, 0)
    assert run.go_on(by_decode=True)
    assert run.request.prompt_token_ids == (1, 2, 3, 7, 8, 9, 10)


def test_sequence_that_was_not_carried_over_may_go_on_by_other_ways() -> None:
    run = make(max_retries=1)
    push(run, 7)
    ids = {run.id, run.begin_carry(), run.begin_carry()}
    assert len(ids) == 3
    run.pause()
    assert run.stats.moves == 0
    assert run.go_on(by_decode=True)
    assert (run.way, run.stats.moves) == ("prefill", 1)
    assert run.request.prompt_token_ids == (1, 2, 3, 7)
