"""Ranks that each have a part of the logits choose the tokens that one with all of them would."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.parallel import Layout
from engine.sampling import Sampled, SamplingParams, SequenceState, sample
from engine.vocabulary import Vocabulary, sample_part


class Threads:
    """The collectives of ranks that are threads of this process; counts the columns it moves."""

    def __init__(self, degree: int) -> None:
        self._barrier = threading.Barrier(degree, timeout=10)
        self._parts: list[Tensor | None] = [None] * degree
        self.columns: list[int] = []

    def of(self, rank: int) -> "OneThread":
        return OneThread(self, rank)

    def gather(self, rank: int, x: Tensor, width: int) -> Tensor:
        self._parts[rank] = x
        self._barrier.wait()
        found = torch.cat([part for part in self._parts if part is not None], -1)[..., :width]
        if rank == 0:
            self.columns.append(width)
        self._barrier.wait()
        return found


class OneThread:
    def __init__(self, group: Threads, rank: int) -> None:
        self._group = group
        self._rank = rank

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        return self._group.gather(self._rank, x, width)

    def all_reduce(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def reduce_scatter(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def all_gather_rows(self, x: Tensor, rows: int) -> Tensor:
        raise NotImplementedError


def split(
    logits_SV: Tensor, states: Sequence[SequenceState], degree: int
) -> tuple[list[Sampled], Threads]:
    size = logits_SV.shape[1]
    group = Threads(degree)

    def rank_samples(rank: int) -> list[Sampled]:
        part = Layout(tp=degree, tp_rank=rank).ragged_part(size)
        vocabulary = Vocabulary(
            part=part, size=size, rank=rank, degree=degree, ranks=group.of(rank)
        )
        return sample_part(logits_SV[:, part], states, vocabulary)

    with ThreadPoolExecutor(degree) as pool:
        found = list(pool.map(rank_samples, range(degree)))
    assert all(each == found[0] for each in found)
    return found[0], group


def state(position: int, **params: Any) -> SequenceState:
    made = SequenceState(
        SamplingParams(**params),
        prompt_len=position,
        prompt_ids=(1, 5, 9),
        min_new_tokens=5,
        suppressed_ids=(0, 3) if position % 2 else (),
    )
    for token_id in (4, 4, 7):
        made.append(token_id)
    return made


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1e-6, 0.3, 1.0, 8.0]),
        "top_k": st.integers(0, 80),
        "top_p": st.sampled_from([1e-4, 0.4, 0.9, 0.9999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.7]),
        "presence_penalty": st.sampled_from([0.0, 0.6]),
        "frequency_penalty": st.sampled_from([0.0, -0.3]),
        "seed": st.integers(0, 1 << 40),
        "logprobs": st.sampled_from([None, None, 0, 3]),
    },
)


@settings(max_examples=150, deadline=None)
@given(
    params=st.lists(PARAMS, min_size=1, max_size=5),
    size=st.sampled_from([10, 11, 64, 300, 1001]),
    degree=st.sampled_from([2, 3, 4]),
    coarse=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_tokens_are_a_single_ranks(
    params: list[dict[str, Any]], size: int, degree: int, coarse: bool, seed: int
) -> None:
    logits_SV = 3 * torch.randn(len(params), size, generator=torch.Generator().manual_seed(seed))
    if coarse:
        logits_SV = logits_SV.round()  # many are equal
    states = [state(position, **each) for position, each in enumerate(params)]
    found, _ = split(logits_SV, states, degree)
    assert found == sample(logits_SV, states)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}])
def test_little_is_exchanged_where_the_likeliest_settle_it(params: dict[str, Any]) -> None:
    size, rows = 32_000, 8
    logits_SV = 6 * torch.randn(rows, size, generator=torch.Generator().manual_seed(1))
    states = [
        SequenceState(SamplingParams(seed=row, **params), prompt_len=3) for row in range(rows)
    ]
    found, group = split(logits_SV, states, 2)
    assert found == sample(logits_SV, states)
    assert sum(group.columns) < rows * size / 50


def test_flat_distribution_is_settled_by_whole_rows() -> None:
    logits_SV = torch.zeros(1, 4000)
    states = [SequenceState(SamplingParams(temperature=1.0, top_p=0.9, seed=2), prompt_len=3)]
    found, group = split(logits_SV, states, 2)
    assert found == sample(logits_SV, states)
    assert group.columns[-1] == 4000
