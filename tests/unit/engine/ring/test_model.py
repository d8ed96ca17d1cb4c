"""What a prefill over ranks is predicted to take, and over how many ranks a prompt is split."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.ring.choose import Load, Variant
from engine.ring.errors import RingError
from engine.ring.model import Machine, Prefill, SplitCosts, ranks_for, split_s
from engine.ring.published import (
    CACHED_PREFILL,
    FULL_PREFILL,
    GTI,
    GTT,
    GTT_CACHED,
    LLAMA_3_405B,
    RING_STEPS,
    FirstToken,
    RingStep,
)

CP = st.integers(1, 128)
LOADS = st.builds(Load, new=st.integers(1, 2_000_000), cached=st.integers(0, 2_000_000))
VARIANTS = st.sampled_from(Variant)
COSTS = st.builds(
    SplitCosts,
    token_s=st.floats(1e-6, 1e-2),
    pair_s=st.floats(0, 1e-6),
    layers=st.integers(1, 128),
    hop_s=st.floats(1e-6, 1e-2),
    token_bytes=st.integers(0, 1 << 16),
    bytes_per_s=st.floats(1e7, 1e11),
)
TOKENS = st.integers(0, 1 << 20)


def prefill(load: Load, ranks: int, machine: Machine = GTT) -> Prefill:
    return Prefill(load=load, model=LLAMA_3_405B, machine=machine, ranks=ranks)


def predicted_s(point: FirstToken, machine: Machine) -> float:
    return prefill(point.load, point.ranks, machine).estimate(point.variant).total_s


@pytest.mark.parametrize(
    ("machine", "points", "within"),
    [(GTT, FULL_PREFILL, 0.06), (GTT_CACHED, CACHED_PREFILL, 0.15)],
)
def test_published_points_are_met(
    machine: Machine, points: tuple[FirstToken, ...], within: float
) -> None:
    for point in points:
        error = 0.01 if point.fitted else within
        assert predicted_s(point, machine) == pytest.approx(point.seconds, rel=error), point


@pytest.mark.parametrize("points", [FULL_PREFILL, CACHED_PREFILL])
def test_most_published_points_are_predicted_and_not_fitted(points: tuple[FirstToken, ...]) -> None:
    assert sum(point.fitted for point in points) <= len(points) / 3


@pytest.mark.parametrize("step", RING_STEPS)
def test_published_steps_of_the_ring_are_met(step: RingStep) -> None:
    ours = prefill(step.load, ranks=4)
    assert ours.block_s() == pytest.approx(step.block_s, rel=0.1)
    assert ours.hop_s(step.variant) == pytest.approx(step.hop_s, rel=0.1)
    if step.home_s is not None:
        assert ours.home_s() == pytest.approx(step.home_s, rel=0.1)


def test_faster_variant_is_the_published_one() -> None:
    points = {(point.load, point.variant): point.seconds for point in CACHED_PREFILL}
    for load in {load for load, _ in points}:
        kv_s, q_s = points[load, Variant.PASS_KV], points[load, Variant.PASS_Q]
        if abs(kv_s / q_s - 1) < 0.02:
            continue  # the paper itself calls less than 1% no difference
        ours = prefill(load, 4, GTT_CACHED)
        ours_kv_s = ours.estimate(Variant.PASS_KV).total_s
        assert (ours_kv_s < ours.estimate(Variant.PASS_Q).total_s) == (kv_s < q_s), load


@pytest.mark.parametrize("ranks", [2, 4])
def test_slow_network_is_hidden_for_long_prompts_alone(ranks: int) -> None:
    """The paper sees the same scaling over 3 GB/s, up to four hosts and for long prompts."""
    assert prefill(Load(128_000, 0), ranks, GTI).estimate(Variant.PASS_KV).waits_s == 0
    assert prefill(Load(8_000, 0), ranks, GTI).estimate(Variant.PASS_KV).waits_s > 0


@settings(deadline=None)
@given(load=LOADS, variant=VARIANTS)
def test_one_rank_has_nobody_to_wait_for(load: Load, variant: Variant) -> None:
    ours = prefill(load, ranks=1).estimate(variant)
    assert ours.waits_s == 0
    assert ours.fixed_s == LLAMA_3_405B.layers * GTT.layer_s


@settings(deadline=None)
@given(
    load=LOADS,
    ranks=CP,
    variant=VARIANTS,
    rate=st.sampled_from([name for name in Machine.__annotations__ if name.endswith("per_s")]),
)
def test_twice_the_rate_is_never_slower(
    load: Load, ranks: int, variant: Variant, rate: str
) -> None:
    faster = replace(GTT, **{rate: 2 * getattr(GTT, rate)})
    before_s = prefill(load, ranks).estimate(variant).total_s
    assert prefill(load, ranks, faster).estimate(variant).total_s <= before_s * (1 + 1e-9)


@settings(deadline=None)
@given(load=LOADS, ranks=st.integers(1, 127), variant=VARIANTS)
def test_more_ranks_compute_less_each(load: Load, ranks: int, variant: Variant) -> None:
    more = prefill(load, ranks + 1).estimate(variant)
    less = prefill(load, ranks).estimate(variant)
    assert more.attention_s < less.attention_s
    assert more.gemm_s <= less.gemm_s


def test_weights_are_read_however_few_the_tokens() -> None:
    each_s = LLAMA_3_405B.weight_bytes / GTT.tp / GTT.memory_bytes_per_s
    assert prefill(Load(1, 0), ranks=128).estimate(Variant.PASS_KV).gemm_s == each_s


def test_short_prompt_gains_nothing_from_many_hosts() -> None:
    def total_s(ranks: int) -> float:
        return prefill(Load(2_000, 0), ranks).estimate(Variant.PASS_KV).total_s

    assert total_s(2) < total_s(1) < total_s(128)


@pytest.mark.parametrize(
    ("load", "ranks", "tp"),
    [(Load(0, 5), 1, 8), (Load(5, -1), 1, 8), (Load(5, 0), 0, 8), (Load(5, 0), 1, 7)],
)
def test_impossible_prefill_is_refused(load: Load, ranks: int, tp: int) -> None:
    with pytest.raises(RingError, match=r"needs|divide"):
        prefill(load, ranks, replace(GTT, tp=tp))


@pytest.mark.parametrize("change", [{"tp": 0}, {"hop_bytes_per_s": 0.0}, {"layer_s": -1e-3}])
def test_impossible_machine_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RingError, match=f"{next(iter(change))} must be"):
        replace(GTT, **change)


@settings(deadline=None)
@given(tokens=st.integers(1, 2_000_000), ranks=CP)
def test_split_costs_what_a_prefill_does(tokens: int, ranks: int) -> None:
    """The rule's terms are the model's, where weights and messages are read in no time at all."""
    machine = replace(GTI, memory_bytes_per_s=1e30, hop_latency_s=0.0, layer_s=0.0)
    alone = prefill(Load(tokens, 0), 1, machine).estimate(Variant.PASS_KV)
    kv_heads = LLAMA_3_405B.kv_heads // machine.tp
    costs = SplitCosts(
        token_s=(alone.gemm_s + alone.all_reduce_s) / tokens,
        pair_s=alone.attention_s / tokens**2,
        layers=LLAMA_3_405B.layers,
        hop_s=machine.step_s,
        token_bytes=2 * kv_heads * LLAMA_3_405B.head_size * LLAMA_3_405B.element_bytes,
        bytes_per_s=machine.hop_bytes_per_s,
    )
    ours = prefill(Load(tokens, 0), ranks, machine).estimate(Variant.PASS_KV)
    assert split_s(tokens, costs, ranks) == pytest.approx(ours.total_s)


@settings(deadline=None)
@given(tokens=TOKENS, costs=COSTS, ranks=CP)
def test_no_other_split_is_sooner(tokens: int, costs: SplitCosts, ranks: int) -> None:
    chosen_s = split_s(tokens, costs, ranks_for(tokens, costs, ranks))
    assert all(chosen_s <= split_s(tokens, costs, count) for count in range(1, ranks + 1))


@settings(deadline=None)
@given(tokens=TOKENS, more=st.integers(1, 1 << 20), costs=COSTS, ranks=CP)
def test_longer_prompt_never_gets_fewer_ranks(
    tokens: int, more: int, costs: SplitCosts, ranks: int
) -> None:
    assert ranks_for(tokens, costs, ranks) <= ranks_for(tokens + more, costs, ranks)


@settings(deadline=None)
@given(tokens=TOKENS, costs=COSTS, ranks=CP)
def test_more_ranks_at_hand_are_never_a_reason_for_fewer(
    tokens: int, costs: SplitCosts, ranks: int
) -> None:
    assert ranks_for(tokens, costs, ranks) <= ranks_for(tokens, costs, ranks + 1)


@settings(deadline=None)
@given(tokens=TOKENS, costs=COSTS, ranks=CP)
def test_prompt_shorter_than_a_hop_stays_on_one_rank(
    tokens: int, costs: SplitCosts, ranks: int
) -> None:
    hop_s = split_s(tokens, costs, 1) / costs.layers
    assert ranks_for(tokens, replace(costs, hop_s=hop_s * 1.01), ranks) == 1


@settings(deadline=None)
@given(costs=COSTS, ranks=CP)
def test_attention_of_a_very_long_prompt_is_worth_all_ranks(costs: SplitCosts, ranks: int) -> None:
    assume(costs.pair_s > 1e-9)
    assert ranks_for(10**12, costs, ranks) == ranks


def test_transfer_slower_than_the_work_it_saves_keeps_a_prompt_on_one_rank() -> None:
    costs = SplitCosts(
        token_s=1e-4, pair_s=0, layers=32, hop_s=0, token_bytes=4096, bytes_per_s=1e9
    )
    assert ranks_for(100_000, costs, 8) == 1
    assert ranks_for(100_000, replace(costs, bytes_per_s=1e10), 8) == 8


def test_impossible_split_is_refused() -> None:
    costs = SplitCosts(
        token_s=1e-4, pair_s=1e-9, layers=32, hop_s=1e-4, token_bytes=4096, bytes_per_s=1e9
    )
    with pytest.raises(RingError, match="at least one rank"):
        ranks_for(10, costs, 0)
    with pytest.raises(RingError, match="negative length"):
        ranks_for(-1, costs, 1)
    with pytest.raises(RingError, match="at least 0"):
        replace(costs, hop_s=-1.0)
    with pytest.raises(RingError, match="above 0"):
        replace(costs, bytes_per_s=0.0)
