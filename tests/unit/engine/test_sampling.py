"""Which token is chosen: filters, penalties, seeds, and independence of the batch."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import SamplingError
from engine.sampling import SamplingParams, SequenceState, sample


def state(*, position: int = 0, seed: int = 0, **params: Any) -> SequenceState:
    return SequenceState(SamplingParams(seed=seed, **params), prompt_len=position)


def draws(logits_V: Tensor, count: int = 4000, **params: Any) -> Tensor:
    """Return how often each token comes up over `count` positions."""
    states = [state(position=place, **params) for place in range(count)]
    tokens = [token.token_id for token in sample(logits_V.expand(count, -1), states)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits_V)) / count


def support(logits_V: Tensor, **params: Any) -> set[int]:
    return set(draws(logits_V, 500, **params).nonzero().flatten().tolist())


PROBS = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = PROBS.log()


def test_greedy_takes_the_first_of_the_most_likely() -> None:
    logits_SV = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 3.0]])
    assert [t.token_id for t in sample(logits_SV, [state(), state(seed=5)])] == [1, 0]


@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.9999}, {"min_p": 0.01}])
def test_tokens_come_up_as_often_as_they_are_likely(params: dict[str, Any]) -> None:
    torch.testing.assert_close(draws(LOGITS, temperature=1.0, **params), PROBS, atol=0.03, rtol=0)


def test_temperature_sharpens_and_flattens() -> None:
    for temperature in (0.5, 2.0):
        expected = (LOGITS / temperature).softmax(-1)
        torch.testing.assert_close(
            draws(LOGITS, temperature=temperature), expected, atol=0.03, rtol=0
        )
    assert support(LOGITS, temperature=1e-6) == {1}
    assert support(LOGITS, temperature=5e-324) == {1}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 0.8}, {1, 3, 4}),
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 0.45}, {1, 3, 4}),
        ({"min_p": 1.0}, {1}),
        # Of the three that top-k leaves, the first two are 0.65 / 0.85 of the mass.
        ({"top_k": 3, "top_p": 0.75}, {1, 3}),
        ({"top_k": 3, "top_p": 0.78}, {1, 3, 4}),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.6}, {1, 3}),
        ({"top_k": 100}, {0, 1, 2, 3, 4}),
    ],
)
def test_filters_keep_what_they_should(params: dict[str, Any], expected: set[int]) -> None:
    assert support(LOGITS, temperature=1.0, **params) == expected


def test_ties_at_the_edge_of_a_filter_go_to_the_lowest_ids() -> None:
    logits = torch.zeros(1000)
    logits[900] = 1.0
    assert support(logits, temperature=1.0, top_k=3) == {0, 1, 900}
    assert support(logits, temperature=1.0, top_k=1) == {900}
    assert max(support(torch.zeros(1000), temperature=1.0, top_p=0.3)) in range(290, 300)


def test_a_flat_distribution_is_filtered_beyond_the_first_candidates() -> None:
    logits = torch.linspace(0, 0.1, 1000)
    kept = support(logits, temperature=1.0, top_p=0.5)
    order = logits.softmax(-1).flip(0).cumsum(0)
    first = 999 - int((order < 0.5).sum())
    assert min(kept) >= first
    assert len(kept) > 256 / 2


@pytest.mark.parametrize(
    ("params", "prompt", "output", "expected"),
    [
        ({"repetition_penalty": 2.0}, [0], [2], [0.5, -1.0, -4.0, 3.0]),
        ({"presence_penalty": 0.5}, [0], [2, 2], [1.0, -1.0, -2.5, 3.0]),
        ({"frequency_penalty": 0.5}, [0], [2, 2, 3], [1.0, -1.0, -3.0, 2.5]),
        ({"presence_penalty": -1.0, "frequency_penalty": 0.25}, [0], [3], [1.0, -1, -2, 3.75]),
        ({"repetition_penalty": 2.0, "presence_penalty": 1.0}, [3], [3], [1, -1, -2, 0.5]),
    ],
)
def test_penalties_change_logits_as_documented(
    params: dict[str, Any], prompt: list[int], output: list[int], expected: list[float]
) -> None:
    sequence = SequenceState(SamplingParams(**params), prompt_len=len(prompt), prompt_ids=prompt)
    for token_id in output:
        sequence.append(token_id)
    logits_V = torch.tensor([1.0, -1.0, -2.0, 3.0])
    sequence.adjust(logits_V)
    assert logits_V.tolist() == expected


def test_penalties_apply_to_greedy_choice_and_leave_the_logits_alone() -> None:
    logits_SV = torch.tensor([[1.0, 3.0, 2.5]]).repeat(2, 1)
    before = logits_SV.clone()
    penalised = SequenceState(SamplingParams(presence_penalty=1.0), prompt_len=0)
    penalised.append(1)
    assert [t.token_id for t in sample(logits_SV, [penalised, state()])] == [2, 1]
    assert logits_SV.equal(before)


def test_end_tokens_wait_for_min_new_tokens() -> None:
    logits_SV = torch.tensor([[1.0, 3.0, 2.0]])
    sequence = SequenceState(
        SamplingParams(), prompt_len=4, min_new_tokens=2, suppressed_ids=[1, 999]
    )
    chosen = []
    for _ in range(3):
        (token,) = sample(logits_SV, [sequence])
        sequence.append(token.token_id)
        chosen.append(token.token_id)
    assert chosen == [2, 2, 1]


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
                "top_k": st.sampled_from([0, 0, 1, 7, 300]),
                "top_p": st.sampled_from([1.0, 0.9, 0.3]),
                "min_p": st.sampled_from([0.0, 0.1]),
                "presence_penalty": st.sampled_from([0.0, 0.6]),
                "seed": st.integers(0, 2**64 - 1),
                "position": st.integers(0, 2**40),
                "logprobs": st.sampled_from([None, 0, 3]),
            }
        ),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=40, deadline=None)
def test_a_sequence_gets_the_same_token_alone_and_in_any_batch(
    requests: list[dict[str, Any]],
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_SV = torch.randn(len(requests), 700, generator=generator) * 3
    states = [state(**request) for request in requests]
    together = sample(logits_SV, states)
    for row, token in enumerate(together):
        (alone,) = sample(logits_SV[row : row + 1], [states[row]])
        assert token.token_id == alone.token_id
    backwards = sample(logits_SV.flip(0), states[::-1])
    assert [t.token_id for t in backwards[::-1]] == [t.token_id for t in together]


def test_rounding_noise_in_the_logits_rarely_changes_a_token() -> None:
    logits_V = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    noise_V = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 1e-5
    states = [state(position=place, temperature=1.0, top_p=0.95) for place in range(2000)]
    clean = sample(logits_V.expand(2000, -1), states)
    noisy = sample((logits_V + noise_V).expand(2000, -1), states)
    assert sum(a.token_id != b.token_id for a, b in zip(clean, noisy, strict=True)) <= 10


def test_seeds_and_positions_give_other_tokens() -> None:
    logits_SV = torch.zeros(1, 5000).expand(64, -1)
    by_seed = sample(logits_SV, [state(seed=seed, temperature=1.0) for seed in range(64)])
    by_place = sample(logits_SV, [state(position=p, temperature=1.0) for p in range(64)])
    assert len({token.token_id for token in by_seed}) > 60
    assert len({token.token_id for token in by_place}) > 60


def test_logprobs_are_the_models_own_whatever_the_parameters() -> None:
    sequence = state(temperature=0.1, top_k=1, logprobs=2, presence_penalty=9.0)
    sequence.append(1)
    (token,) = sample(LOGITS[None], [sequence])
    assert token.token_id == 3
    assert token.logprobs is not None
    assert token.logprobs.chosen == pytest.approx(math.log(0.25))
    assert [token_id for token_id, _ in token.logprobs.top] == [1, 3]
    assert token.logprobs.top[0][1] == pytest.approx(math.log(0.4))


def test_each_sequence_gets_as_many_logprobs_as_it_asked_for() -> None:
    wanted = [None, 0, 1, 4, 99]
    tokens = sample(LOGITS.expand(5, -1), [state(logprobs=count) for count in wanted])
    found = [None if t.logprobs is None else len(t.logprobs.top) for t in tokens]
    assert found == [None, 0, 1, 4, 5]


def test_one_sequence_of_nan_does_not_fail_the_others() -> None:
    logits_SV = torch.stack((torch.full((5,), torch.nan), LOGITS, LOGITS))
    variants: list[dict[str, Any]] = [{"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {}]
    for params in variants:
        tokens = sample(logits_SV, [state(**params), state(top_k=1, temperature=1.0), state()])
        assert [token.token_id for token in tokens[1:]] == [1, 1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", -1),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(SamplingError, match=f"^{field} is ") as refused:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert refused.value.field == field
