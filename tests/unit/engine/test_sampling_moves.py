"""Seeded sampling follows the distribution, and a sequence that moves chooses what it would have.

Legend: V vocabulary, K kinds of outcome that are counted, S sequences.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.sampling import SamplingParams, SequenceState, sample

DRAWS = 5_000
VOCAB = 40
LENGTH = 24


def chi_square(observed_K: Tensor, probs_K: Tensor) -> float:
    """Return Pearson's statistic over the outcomes that can happen."""
    expected_K = probs_K * observed_K.sum()
    possible_K = expected_K > 0
    assert not observed_K[~possible_K].any()
    deviation_K = (observed_K - expected_K)[possible_K]
    return float((deviation_K.square() / expected_K[possible_K]).sum())


def filtered(logits_V: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return the distribution that the parameters ask for, worked out token by token."""
    probs_V = (logits_V.double() / temperature).softmax(-1)
    order = probs_V.argsort(descending=True).tolist()[: top_k or None]
    total = sum(float(probs_V[token]) for token in order)
    kept, before = torch.zeros_like(probs_V), 0.0
    for token in order:
        if before < top_p * total:
            kept[token] = probs_V[token]
        before += float(probs_V[token])
    return kept / kept.sum()


@pytest.mark.parametrize("counted", ["positions", "seeds"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 12, 1.0), (1.0, 0, 0.8)]
)
def test_seeded_draws_pass_a_chi_square_test(
    temperature: float, top_k: int, top_p: float, counted: str
) -> None:
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    states = [
        SequenceState(SamplingParams(seed=seed, **params), prompt_len=place)  # type: ignore[arg-type]
        for seed, place in (
            (9, number) if counted == "positions" else (number, 9) for number in range(DRAWS)
        )
    ]
    tokens = [token.token_id for token in sample(logits_V.expand(DRAWS, -1), states)]
    probs_V = filtered(logits_V, temperature, top_k, top_p)
    statistic = chi_square(torch.bincount(torch.tensor(tokens), minlength=VOCAB).double(), probs_V)
    freedom = int((probs_V > 0).sum()) - 1
    # The mean is `freedom` and the variance twice that: five deviations are one in a million.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def logits_at(tokens: list[int]) -> Tensor:
    """A model that looks at all tokens so far, and at their order."""
    seed = hash(tuple(tokens)) % 2**63
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def go_on(state: SequenceState, tokens: list[int], length: int) -> list[int]:
    """Sample until there are `length` tokens in all."""
    tokens = list(tokens)
    while len(tokens) < length:
        (chosen,) = sample(logits_at(tokens)[None], [state])
        state.append(chosen.token_id)
        tokens.append(chosen.token_id)
    return tokens


def begin(prompt: list[int], output: list[int], min_new: int, **params: Any) -> SequenceState:
    return SequenceState(
        SamplingParams(**params),
        prompt_len=len(prompt),
        prompt_ids=prompt,
        output_ids=output,
        min_new_tokens=min_new,
        suppressed_ids=[0, 1, 2, 3],
    )


@given(
    params=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.8, 1.6]),
            "top_k": st.sampled_from([0, 5]),
            "top_p": st.sampled_from([1.0, 0.7]),
            "repetition_penalty": st.sampled_from([1.0, 1.4]),
            "presence_penalty": st.sampled_from([0.0, 0.9]),
            "frequency_penalty": st.sampled_from([0.0, -0.4, 0.6]),
            "seed": st.integers(0, 2**64 - 1),
        }
    ),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    moves=st.lists(st.integers(1, LENGTH - 1), max_size=4),
    min_new=st.integers(0, LENGTH),
)
@settings(max_examples=60, deadline=None)
def test_sequence_that_moves_chooses_what_it_would_have(
    params: dict[str, Any], prompt: list[int], moves: list[int], min_new: int
) -> None:
    length = len(prompt) + LENGTH
    undisturbed = go_on(begin(prompt, [], min_new, **params), prompt, length)
    tokens = prompt
    for place in sorted(moves):
        state = begin(prompt, tokens[len(prompt) :], min_new, **params)
        assert state.position == len(tokens)
        tokens = go_on(state, tokens, max(len(tokens), len(prompt) + place))
    tokens = go_on(begin(prompt, tokens[len(prompt) :], min_new, **params), tokens, length)
    assert tokens == undisturbed


def test_moved_sequence_in_a_batch_chooses_what_it_would_have_alone() -> None:
    params: dict[str, Any] = {"temperature": 1.0, "frequency_penalty": 0.7, "seed": 3}
    prompt, output = [4, 5], [6, 6, 7]
    stayed = begin(prompt, [], 0, **params)
    for token in output:
        stayed.append(token)
    moved = begin(prompt, output, 0, **params)
    other = begin([1], [], 0, temperature=1.0, seed=4)
    logits_SV = torch.stack([logits_at([1]), logits_at([9]), logits_at([9])])
    _, in_batch, also = sample(logits_SV, [other, moved, stayed])
    (alone,) = sample(logits_SV[1:2], [moved])
    assert in_batch.token_id == also.token_id == alone.token_id
