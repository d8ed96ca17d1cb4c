"""What is made of measured times: the costs, on all ranks the same, and the grain."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.ring.calibrate import (
    LEAST_GRAIN,
    MOST_GRAIN,
    Stopwatch,
    Subject,
    fit,
    grain_for,
    measure,
    shared,
)
from engine.ring.comm import Pending, Solo, Wire
from engine.ring.errors import CommError, RingError
from engine.ring.model import SplitCosts, ranks_for
from tests.unit.engine.ring.threads import LoopbackComm, Meeting, on_ranks

LENGTHS = (64, 128, 256, 512, 1024, 2048)
COSTS = SplitCosts(
    token_s=1e-4, pair_s=1e-7, layers=4, hop_s=1e-3, token_bytes=1024, bytes_per_s=1e9
)
SUBJECT = Subject(layers=4, token_bytes=1024, longest=8192, device=torch.device("cpu"))
TERMS = st.tuples(st.floats(1e-4, 1e-2), st.floats(1e-6, 1e-3), st.floats(1e-10, 1e-7))


def seconds(terms: Sequence[float], tokens: int) -> float:
    return terms[0] + terms[1] * tokens + terms[2] * tokens**2


def error(terms: Sequence[float], points: Sequence[tuple[int, float]]) -> float:
    return sum((seconds(terms, tokens) / found - 1) ** 2 for tokens, found in points)


@settings(deadline=None)
@given(terms=TERMS, without=st.sets(st.integers(0, 2), max_size=2))
def test_fit_finds_the_terms_of_exact_times(terms: tuple[float, ...], without: set[int]) -> None:
    terms = tuple(0.0 if i in without else term for i, term in enumerate(terms))
    found = fit([(tokens, seconds(terms, tokens)) for tokens in LENGTHS])
    for tokens in LENGTHS:
        for term in range(3):
            part = found[term] * tokens**term / seconds(terms, tokens)
            assert part == pytest.approx(
                terms[term] * tokens**term / seconds(terms, tokens), abs=1e-4
            )


@settings(deadline=None)
@given(
    times=st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=6),
    other=st.tuples(st.floats(0, 1.0), st.floats(0, 1e-2), st.floats(0, 1e-5)),
    near=st.tuples(*[st.floats(0.9, 1.1)] * 3),
)
def test_no_other_terms_that_are_not_negative_fit_better(
    times: list[float], other: tuple[float, ...], near: tuple[float, ...]
) -> None:
    points = list(zip(LENGTHS, times, strict=False))
    found = fit(points)
    assert min(found) >= 0
    nearby = [a * b for a, b in zip(found, near, strict=True)]
    assert error(found, points) <= min(error(other, points), error(nearby, points)) + 1e-9


def test_a_single_time_is_all_of_tokens() -> None:
    assert fit([(64, 0.128)]) == pytest.approx((0, 0.002, 0))


@settings(deadline=None)
@given(
    token_s=st.floats(1e-6, 1e-2),
    hop_s=st.floats(0, 1e-1),
    ranks=st.integers(2, 16),
    block_size=st.integers(1, 2048),
    most=st.integers(0, 4096),
)
def test_grain_is_the_longest_prompt_for_one_rank_within_its_bounds(
    token_s: float, hop_s: float, ranks: int, block_size: int, most: int
) -> None:
    costs = replace(COSTS, token_s=token_s, hop_s=hop_s)
    grain = grain_for(costs, ranks, block_size, most)
    assert grain % block_size == 0
    highest = max(block_size, min(most, MOST_GRAIN) // block_size * block_size)
    lowest = min(math.ceil(LEAST_GRAIN / block_size) * block_size, highest)
    assert lowest <= grain <= highest
    if grain > lowest:
        assert ranks_for(grain, costs, ranks) == 1
    if grain < highest:
        assert ranks_for(grain + block_size, costs, ranks) > 1


def test_dear_hops_make_long_grains_and_cheap_ones_short() -> None:
    def grain(hop_s: float) -> int:
        return grain_for(replace(COSTS, hop_s=hop_s), 2, 16)

    # Two ranks save half of 0.1 ms a token and of 0.1 us a pair; a hop of 4 layers takes 12 ms.
    assert [grain(hop_s) for hop_s in (1e-6, 3e-3, 1.0)] == [64, 192, 1024]


def test_blocks_of_no_tokens_are_refused() -> None:
    with pytest.raises(RingError, match="at least one token, found 0"):
        grain_for(COSTS, 2, 0)


def test_costs_that_the_first_rank_knows_are_known_to_all() -> None:
    meeting = Meeting(3)

    def known(comm: LoopbackComm) -> list[SplitCosts | None]:
        mine = None if comm.rank else COSTS
        return [shared(mine, meeting.greatest), shared(None, meeting.greatest)]

    assert on_ranks(3, known) == [[COSTS, None]] * 3


@dataclass
class Machine:
    """A rank that takes `slower` times what COSTS say, by its own clock."""

    comm: LoopbackComm
    slower: float
    now: float = 0.0
    tried: list[tuple[int, int]] = field(default_factory=list)

    rank = property(lambda self: self.comm.rank)
    size = property(lambda self: self.comm.size)

    def clock(self) -> float:
        return self.now

    def trial(self, tokens: int, wire: Wire) -> Callable[[], object]:
        hops_s = (wire.size - 1) * COSTS.layers * COSTS.hop_s

        def run() -> None:
            self.tried.append((tokens, wire.size))
            self.now += self.slower * (
                seconds((5e-3, COSTS.token_s, COSTS.pair_s), tokens) + hops_s
            )

        return run

    def send(self, message: Tensor, to: int, tag: int) -> Pending:
        return self.comm.send(message, to, tag)

    def receive(self, into: Tensor, source: int, tag: int) -> Pending:
        return _Arriving(self, self.comm.receive(into, source, tag), into.nbytes)


@dataclass
class _Arriving:
    machine: Machine
    pending: Pending
    size: int

    def wait(self) -> None:
        self.pending.wait()
        self.machine.now += self.machine.slower * (1e-5 + self.size / COSTS.bytes_per_s)


def measured(slower: Sequence[float], subject: Subject) -> list[tuple[SplitCosts, Machine]]:
    meeting = Meeting(len(slower))

    def run(comm: LoopbackComm) -> tuple[SplitCosts, Machine]:
        machine = Machine(comm, slower[comm.rank])
        watch = Stopwatch(meeting.greatest, machine.clock)
        return measure(machine.trial, Wire(machine), subject, watch), machine

    return list(on_ranks(len(slower), run))


@pytest.mark.parametrize("slower", [(1.0, 1.0), (1.0, 3.0), (1.5, 1.0, 1.2)])
def test_all_ranks_measure_the_costs_of_the_slowest(slower: tuple[float, ...]) -> None:
    results = measured(slower, SUBJECT)
    for found, _ in results:
        assert found == results[0][0]
        assert found.token_s == pytest.approx(COSTS.token_s * max(slower))
        assert found.pair_s == pytest.approx(COSTS.pair_s * max(slower))
        assert found.hop_s == pytest.approx(COSTS.hop_s * max(slower))
        assert found.bytes_per_s == pytest.approx(COSTS.bytes_per_s / max(slower), rel=0.01)
        assert (found.layers, found.token_bytes) == (COSTS.layers, COSTS.token_bytes)


def test_ranks_run_the_same_passes_however_fast_each_is() -> None:
    runs = [machine.tried for _, machine in measured((1.0, 7.0, 40.0), SUBJECT)]
    assert runs[0] == runs[1] == runs[2]


def test_slow_model_is_measured_on_few_passes() -> None:
    [(costs, machine), _] = measured((300.0, 300.0), SUBJECT)
    assert machine.tried == [(64, 1), (64, 1), (64, 2)]
    assert costs.token_s > 0


def test_model_of_short_sequences_is_measured_on_these() -> None:
    [(_, machine), _] = measured((1.0, 1.0), replace(SUBJECT, longest=100))
    assert set(machine.tried) == {(64, 1), (64, 2)}
    [(_, machine), _] = measured((1.0, 1.0), replace(SUBJECT, longest=10))
    assert set(machine.tried) == {(10, 1), (10, 2)}


def test_a_ring_of_one_rank_has_nobody_to_talk_to() -> None:
    message = torch.zeros(1)
    with pytest.raises(CommError, match="has no rank 1"):
        Solo().send(message, 1, 0)
    with pytest.raises(CommError, match="has no rank 1"):
        Solo().receive(message, 1, 0)
