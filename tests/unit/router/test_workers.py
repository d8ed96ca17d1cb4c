"""Prompts are spread over an instance's ranks, and those that begin alike begin at the same one."""

from collections import Counter
from dataclasses import replace

from twinpool.v1 import kv_pb2

from router.membership import Instance
from router.request import Sampling, Stop, ValidRequest
from router.workers import cp_first, layout_from
from tests.unit.router.test_membership import instance

ROUND = 64


def wide(cp: int) -> Instance:
    made = instance()
    capacity = replace(made.capacity, block_size=ROUND)
    return replace(made, layout=replace(made.layout, cp=cp), capacity=capacity)


SAMPLING = Sampling(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    seed=None,
    logprobs=None,
)
STOP = Stop(max_new_tokens=4, min_new_tokens=0, strings=(), token_ids=(), ignore_eos=False)


def request(*prompt: int, salt: str = "") -> ValidRequest:
    return ValidRequest(
        prompt_token_ids=prompt, sampling=SAMPLING, stop=STOP, priority=0, cache_salt=salt
    )


def test_instance_without_context_parallelism_has_one_place_to_begin() -> None:
    assert cp_first(wide(1), request(7, 8, 9)) == 0


def test_different_prompts_are_spread_over_all_ranks() -> None:
    begun = Counter(cp_first(wide(4), request(5, number)) for number in range(400))
    assert sorted(begun) == [0, 1, 2, 3]
    assert min(begun.values()) > 60


def test_prompts_that_begin_alike_begin_at_the_same_rank() -> None:
    head = range(ROUND)
    begun = {cp_first(wide(4), request(*head, more)) for more in range(50)}
    assert len(begun) == 1
    salted = {cp_first(wide(4), request(*head, salt=str(salt))) for salt in range(50)}
    assert salted == {0, 1, 2, 3}


def test_decode_is_told_where_the_prompt_begins() -> None:
    told = layout_from(wide(2), 1)
    assert told.cp_first == 1
    told.cp_first = 0
    assert told == kv_pb2.KvLayout.FromString(wide(2).layout.wire)
