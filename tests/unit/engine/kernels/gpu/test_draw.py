"""Tokens drawn without a sort, against those of a sort in fp64 and of the engine's own sampling."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.gpu import draw_torch
from engine.kernels.table import PagedKernels
from engine.philox import uniforms
from engine.sampling import SamplingParams, SequenceState, sample
from tests.unit.engine.kernels.gpu.tensors import apart


def columns(
    params: list[SamplingParams], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Temperature, top-k, top-p and min-p of each."""
    return (
        torch.tensor([p.temperature for p in params], device=device),
        torch.tensor([p.top_k for p in params], dtype=torch.int32, device=device),
        torch.tensor([p.top_p for p in params], device=device),
        torch.tensor([p.min_p for p in params], device=device),
    )


FILTERS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
)


@given(
    params=st.lists(FILTERS, min_size=1, max_size=3),
    vocab=st.sampled_from([1, 7, 100, 300]),
    levels=st.sampled_from([2, 9, 10**6]),
    number=st.floats(0.001, 0.999),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_tokens_are_those_of_a_sort(
    gpu: PagedKernels,
    device: torch.device,
    params: list[SamplingParams],
    vocab: int,
    levels: int,
    number: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Of few levels: many tokens are exactly alike.
    logits = torch.randint(-levels, levels + 1, (len(params), vocab), generator=generator)
    logits_SV = apart((logits * (6.0 / levels)).to(device))
    number_S = torch.full((len(params),), number, dtype=torch.float64, device=device)
    asked = (logits_SV, *columns(params, device))
    found_S = gpu.draw(*asked, number_S)
    # Sums are rounded otherwise: next to a step either token is right.
    near = [draw_torch.draw(*asked, (number_S + by).clamp(0, 1)) for by in (-1e-5, 0.0, 1e-5)]
    for row, token in enumerate(found_S.tolist()):
        assert token in {int(each[row]) for each in near}


def test_tokens_are_those_of_the_engines_sampling(gpu: PagedKernels, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    logits_SV = 4 * torch.randn(6, 500, generator=generator)
    params = [
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=1),
        SamplingParams(temperature=1.5, top_p=0.7, seed=2),
        SamplingParams(temperature=1.0, top_k=3, seed=3),
        SamplingParams(temperature=2.0, min_p=0.2, seed=4),
        SamplingParams(temperature=1.0, seed=5),
        SamplingParams(temperature=0.5, top_k=100, top_p=0.5, min_p=0.05, seed=6),
    ]
    states = [SequenceState(each, prompt_len=9 + row) for row, each in enumerate(params)]
    numbers = uniforms([each.seed for each in params], [state.position for state in states])
    found_S = gpu.draw(
        logits_SV.to(device), *columns(params, device), torch.from_numpy(numbers).to(device)
    )
    assert found_S.tolist() == [sampled.token_id for sampled in sample(logits_SV, states)]


def test_what_is_suppressed_is_never_drawn(gpu: PagedKernels, device: torch.device) -> None:
    logits_SV = torch.full((4, 64), -torch.inf, device=device)
    logits_SV[:, 40] = 1.0
    params = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_k=7),
        SamplingParams(temperature=1.0, top_p=0.4),
        SamplingParams(temperature=1.0, top_k=7, top_p=0.9),
    ]
    for number in (0.0, 0.999999):
        number_S = torch.full((4,), number, dtype=torch.float64, device=device)
        assert gpu.draw(logits_SV, *columns(params, device), number_S).tolist() == [40] * 4


def test_a_row_of_nan_disturbs_no_other(gpu: PagedKernels, device: torch.device) -> None:
    logits_SV = torch.zeros(2, 64, device=device)
    logits_SV[0] = torch.nan
    logits_SV[1, 5] = 50.0
    params = [SamplingParams(temperature=1.0, top_k=4, top_p=0.9)] * 2
    number_S = torch.full((2,), 0.5, dtype=torch.float64, device=device)
    found_S = gpu.draw(logits_SV, *columns(params, device), number_S)
    assert 0 <= int(found_S[0]) < 64
    assert int(found_S[1]) == 5


@pytest.mark.parametrize("vocab", [64, 5000])
def test_frequencies_follow_the_distribution(
    gpu: PagedKernels, device: torch.device, vocab: int
) -> None:
    """The middle of each of 50 equal parts of the numbers: as many tokens as their weights say."""
    logits_SV = torch.full((50, vocab), -torch.inf, device=device)
    share = torch.tensor([0.5, 0.3, 0.2], device=device)
    logits_SV[:, vocab // 2 : vocab // 2 + 3] = share.log()
    params = [SamplingParams(temperature=1.0)] * 50
    number_S = (torch.arange(50, dtype=torch.float64, device=device) + 0.5) / 50
    found_S = gpu.draw(logits_SV, *columns(params, device), number_S) - vocab // 2
    assert torch.bincount(found_S, minlength=3).tolist() == [25, 15, 10]


def test_no_sequences_are_no_tokens(gpu: PagedKernels, device: torch.device) -> None:
    none = torch.empty(0, device=device)
    assert not len(gpu.draw(torch.empty(0, 9, device=device), none, none.int(), none, none, none))
