"""How long an answer is expected to get by what others came to, and what may come of that."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, pvariance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.output_lengths import OutputLengths
from router.overcommit import Blocks, Held, final_blocks, risk, risks
from router.views import Capacity, InstanceKey, Need, Promise

NEED = Need(prompt_tokens=100, max_new_tokens=1000)
DECODE = InstanceKey("decode", 1)


def learned(
    ended: Sequence[int] = (), cut: Sequence[int] = (), quantile: float = 0.9
) -> OutputLengths:
    """Those of one tenant, in an order by chance."""
    lengths = OutputLengths(quantile)
    answers = [(n, False) for n in ended] + [(n, True) for n in cut]
    for tokens, is_cut in random.Random(1).sample(answers, len(answers)):
        lengths.finished("a", tokens, is_cut=is_cut)
    return lengths


def expected(lengths: OutputLengths, need: Need = NEED, tenant: str = "a") -> int:
    return lengths.expect(tenant, need).expected_new_tokens


# ---- what is expected


def test_nothing_is_expected_unless_asked_for() -> None:
    lengths = OutputLengths()
    lengths.finished("a", 10, is_cut=False)
    assert lengths.expect("a", NEED) == NEED


def test_all_is_expected_until_enough_have_ended() -> None:
    assert expected(learned([10] * 19)) == 1000
    assert expected(learned([10] * 20)) == 10
    assert expected(learned([10] * 199, quantile=0.99)) == 1000
    assert expected(learned([10] * 200, quantile=0.99)) == 10


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_quantile_is_that_of_the_answers_to_a_tenth(quantile: float) -> None:
    rng = random.Random(3)
    answers = [1 + int(rng.lognormvariate(4, 1)) for _ in range(400)]
    true = sorted(answers)[math.ceil(quantile * 400) - 1]
    assert true <= expected(learned(answers, quantile=quantile), NEED) <= 1.12 * true + 1


def test_each_tenant_is_known_by_its_own_answers_and_others_by_all() -> None:
    lengths = OutputLengths(0.9)
    for _ in range(30):
        lengths.finished("short", 8, is_cut=False)
        lengths.finished("long", 500, is_cut=False)
    lengths.finished("new", 3, is_cut=False)
    assert expected(lengths, tenant="short") == 8
    assert 500 <= expected(lengths, tenant="long") <= 560
    assert expected(lengths, tenant="new") == expected(lengths, tenant="other")
    assert expected(lengths, tenant="new") >= 500


def test_no_more_is_expected_than_there_may_be() -> None:
    lengths = learned([500] * 50)
    assert expected(lengths, replace(NEED, max_new_tokens=100)) == 100
    assert expected(lengths, replace(NEED, max_new_tokens=1)) == 0  # decode has no part in it


def test_answers_that_were_cut_off_would_have_been_longer() -> None:
    assert expected(learned(cut=[16] * 100)) == 1000
    # Half of those that got beyond 16 tokens ended by 200, the others were not seen to end.
    assert expected(learned([100] * 20, cut=[16] * 100 + [200] * 20)) == 1000
    # Nine of ten that were let go on did end.
    assert 100 <= expected(learned([100] * 36, cut=[16] * 100 + [200] * 4)) <= 110


def test_what_goes_on_is_expected_to_be_as_long_as_those_that_got_as_far() -> None:
    lengths = learned([10] * 90 + [400] * 60)
    need = replace(NEED, max_new_tokens=900, prompt_tokens=200, generated_tokens=100)
    assert 300 <= expected(lengths, need) <= 350
    # So far has nobody come.
    assert expected(lengths, replace(need, generated_tokens=600)) == 900


def test_what_is_sure_to_come_is_expected() -> None:
    lengths = learned([10] * 90 + [400] * 60, quantile=0.5)
    assert expected(lengths) == 10
    assert expected(lengths, replace(NEED, sure_new_tokens=50)) >= 400
    assert expected(lengths, replace(NEED, sure_new_tokens=1000)) == 1000


def test_later_answers_count_more_than_earlier_ones() -> None:
    lengths = OutputLengths(0.9)
    for tokens in [500] * 400 + [10] * 3000:
        lengths.finished("a", tokens, is_cut=False)
    assert expected(lengths) == 10


def test_tenants_are_remembered_up_to_a_bound() -> None:
    lengths = OutputLengths(0.9)
    for _ in range(30):
        lengths.finished("first", 10, is_cut=False)
    for number in range(1024):
        lengths.finished(f"tenant {number}", 900, is_cut=False)
    assert len(lengths._of_tenant) == 1024
    assert expected(lengths, tenant="first") > 500


@given(
    ended=st.lists(st.integers(1, 1 << 24), max_size=60),
    cut=st.lists(st.integers(1, 1 << 24), max_size=60),
    quantile=st.floats(0.5, 0.99),
    new=st.integers(2, 5000),
    generated=st.integers(0, 5000),
    sure=st.integers(0, 5000),
)
def test_whatever_was_seen_what_is_expected_can_be(
    ended: list[int], cut: list[int], quantile: float, new: int, generated: int, sure: int
) -> None:
    need = Need(
        prompt_tokens=5001,
        max_new_tokens=new,
        generated_tokens=generated,
        sure_new_tokens=min(sure, new),
    )
    lengths = learned(ended, cut, quantile)
    found = expected(lengths, need)
    assert max(1, need.sure_new_tokens) <= found <= new
    for came_to in (generated, generated + new // 2, generated + new):
        answer = lengths.final_tokens("a", need, came_to)
        assert came_to - 1e-6 * came_to <= answer.mean <= (generated + new) * (1 + 1e-6)
        assert answer.variance <= (1 + new) ** 2


# ---- what may come of it


def capacity(block_size: int = 16) -> Capacity:
    return Capacity(
        blocks=100,
        block_size=block_size,
        max_sequences=64,
        max_sequence_tokens=2000,
        expected_output_tokens=8,
    )


def held(number: int = 0, tokens: int = 100) -> Held:
    return Held(key=DECODE, dp_rank=0, tenant="a", need=NEED, tokens=tokens + number % 7)


def test_mean_and_variance_of_what_is_to_come_are_those_of_the_answers() -> None:
    rng = random.Random(2)
    answers = [1 + int(rng.lognormvariate(4, 0.7)) for _ in range(400)]
    longer = [min(answer, 200) for answer in answers if answer > 40]
    found = learned(answers).final_tokens("a", replace(NEED, max_new_tokens=200), 40)
    assert found.mean == pytest.approx(fmean(longer), rel=0.08)
    assert found.variance == pytest.approx(pvariance(longer), rel=0.15)


def test_risk_is_near_the_share_of_futures_that_lack_blocks() -> None:
    rng = random.Random(4)
    answers = [1 + int(rng.lognormvariate(4, 0.8)) for _ in range(400)]
    lengths, sequences = learned(answers), [held(number) for number in range(20)]
    needs = sorted(
        sum(-(-(each.tokens + rng.choice(answers)) // 16) for each in sequences)
        for _ in range(2000)
    )
    for part in (0.5, 0.8, 0.95):
        blocks = needs[int(part * 2000)]
        promise = Promise(capacity=capacity(), blocks=(blocks,))
        found = risks(sequences, {DECODE: promise}, lengths)[DECODE]
        # Whatever is in the buckets counts as their upper end.
        assert 0.5 * (1 - part) <= found <= (1 - part) + 0.2


def test_what_cannot_be_and_what_must_be_is_said_exactly() -> None:
    lengths = learned([100] * 30)
    [one] = [held(tokens=160)]
    needed = final_blocks(one, lengths.final_tokens("a", NEED, 60), capacity())
    assert (needed.least, needed.most) == (10, 69)
    assert risk(needed, 69) == 0.0
    assert risk(needed, 9) == 1.0
    assert 0.0 < risk(needed, 13) < 1.0
    assert risk(Blocks(), 0) == 0.0


def test_unknown_lengths_count_as_all_that_may_come() -> None:
    promises = {DECODE: Promise(capacity=capacity(), blocks=(68,))}
    assert risks([held()], promises, OutputLengths()) == {DECODE: 1.0}
    promises = {DECODE: Promise(capacity=capacity(), blocks=(69,))}
    assert risks([held()], promises, OutputLengths()) == {DECODE: 0.0}


def test_fullest_dp_rank_speaks_for_its_instance() -> None:
    promise = Promise(capacity=replace(capacity(), dp=2), blocks=(69, 69))
    sequences = [held(), replace(held(), dp_rank=1), replace(held(), dp_rank=1)]
    assert risks(sequences[:2], {DECODE: promise}, OutputLengths()) == {DECODE: 0.0}
    assert risks(sequences, {DECODE: promise}, OutputLengths()) == {DECODE: 1.0}
    assert risks(sequences, {}, OutputLengths()) == {}
