"""The variants over ranks that are threads; over processes they are tested in integration."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ring import (
    AttentionShape,
    CommError,
    GatherKV,
    Load,
    PassKV,
    PassQ,
    Pieces,
    RingAttention,
    RingError,
    RingPlan,
    SequenceShards,
    Wire,
)
from engine.ring.choose import pass_kv_bytes, pass_q_bytes
from tests.unit.engine.ring.passes import MadePass
from tests.unit.engine.ring.threads import LoopbackComm, on_ranks

VARIANTS: dict[str, Callable[[Wire], RingAttention]] = {
    "pass-kv": PassKV,
    "pass-q": PassQ,
    "gather-kv": GatherKV,
}
SHAPE = AttentionShape(heads=4, kv_heads=2, head_size=8, element_bytes=4)
LENGTHS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=40)
@given(
    lengths=LENGTHS,
    ranks=st.integers(1, 5),
    window=st.none() | st.integers(1, 80),
    seed=st.integers(0, 1 << 20),
    scatter=st.booleans(),
    planes=st.sampled_from([1, 2]),
    variant=st.sampled_from(sorted(VARIANTS)),
)
def test_every_rank_has_what_one_rank_would_have(
    lengths: list[tuple[int, int]],
    ranks: int,
    window: int | None,
    seed: int,
    scatter: bool,
    planes: int,
    variant: str,
) -> None:
    shape = replace(SHAPE, kv_heads=planes, planes=planes, window=window)
    made = MadePass(shape, lengths, ranks, seed=seed, scatter=scatter)

    def run(comm: LoopbackComm) -> tuple[torch.Tensor, int]:
        wire = Wire(comm)
        q, kv = made.queries(comm.rank), made.keys(comm.rank)
        return VARIANTS[variant](wire).attend(q, kv, made.plan), wire.traffic.bytes_sent

    results = on_ranks(ranks, run)
    for rank, (out, _) in enumerate(results):
        torch.testing.assert_close(out.double(), made.expected(rank), rtol=0, atol=1e-5)
    formula = pass_q_bytes if variant == "pass-q" else pass_kv_bytes
    most = sum(formula(Load(new, cached), shape, ranks) for cached, new in lengths)
    assert sum(sent for _, sent in results) == needed(made.plan, variant, shape) <= most


def needed(plan: RingPlan, variant: str, shape: AttentionShape) -> int:
    """The bytes that must be sent: each block as far as somebody looks at it."""
    kv_row = shape.key_bytes
    q_row, home_row = SHAPE.heads * SHAPE.head_size * 4, SHAPE.heads * (SHAPE.head_size + 1) * 4
    pairs = [(q, k) for q in range(plan.ranks) for k in range(plan.ranks) if q != k]
    looks = [(q, k) for q, k in pairs if plan.sees(q, k)]
    if variant == "gather-kv":
        return sum(plan.key_rows[k] for _, k in looks) * kv_row
    if variant == "pass-kv":
        far = {k: max((q - k) % plan.ranks for q, of in looks if of == k) for _, k in looks}
        return sum(plan.key_rows[k] * hops for k, hops in far.items()) * kv_row
    far = {q: max((k - q) % plan.ranks for of, k in looks if of == q) for q, _ in looks}
    there = sum(plan.query_rows[q] * hops for q, hops in far.items()) * q_row
    return there + sum(plan.query_rows[q] for q, _ in looks) * home_row


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_prompts_that_lie_on_one_rank_each_cause_no_traffic(variant: str) -> None:
    def run(comm: LoopbackComm) -> int:
        nobody: tuple[Pieces, ...] = ((), ())
        plan = RingPlan(
            (
                SequenceShards(new=((range(20),), ()), cached=nobody),
                SequenceShards(new=((), (range(8, 30),)), cached=((), (range(8),))),
            )
        )
        wire = Wire(comm)
        q = torch.randn(plan.query_rows[comm.rank], SHAPE.heads, SHAPE.head_size)
        kv = torch.randn(plan.key_rows[comm.rank], 2 * SHAPE.kv_heads, SHAPE.head_size)
        VARIANTS[variant](wire).attend(q, kv, plan)
        return wire.traffic.bytes_sent

    assert on_ranks(2, run) == [0, 0]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_long_prompt_sends_what_theory_says(variant: str) -> None:
    made = MadePass(SHAPE, [(0, 400)], 4)

    def run(comm: LoopbackComm) -> int:
        wire = Wire(comm)
        VARIANTS[variant](wire).attend(made.queries(comm.rank), made.keys(comm.rank), made.plan)
        return wire.traffic.bytes_sent

    formula = pass_q_bytes if variant == "pass-q" else pass_kv_bytes
    assert sum(on_ranks(4, run)) == formula(Load(400, 0), SHAPE, 4)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_passes_follow_one_another_on_one_wire(variant: str) -> None:
    passes = [MadePass(SHAPE, [(20 * i, 30 - i)], 3, seed=i) for i in range(6)]

    def run(comm: LoopbackComm) -> list[torch.Tensor]:
        ring = VARIANTS[variant](Wire(comm))
        return [
            ring.attend(each.queries(comm.rank), each.keys(comm.rank), each.plan) for each in passes
        ]

    for rank, outs in enumerate(on_ranks(3, run)):
        for out, each in zip(outs, passes, strict=True):
            torch.testing.assert_close(out.double(), each.expected(rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_bfloat16_in_is_bfloat16_out_within_its_rounding(variant: str) -> None:
    made = MadePass(SHAPE, [(50, 40)], 2, dtype=torch.bfloat16)

    def run(comm: LoopbackComm) -> torch.Tensor:
        q, kv = made.queries(comm.rank), made.keys(comm.rank)
        return VARIANTS[variant](Wire(comm)).attend(q, kv, made.plan)

    for rank, out in enumerate(on_ranks(2, run)):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), made.expected(rank), rtol=2**-7, atol=2**-7)


def test_tags_begin_anew_only_where_a_whole_range_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.ring.comm._TAGS", 10)
    wire = on_ranks(1, Wire)[0]
    assert [wire.tags(4) for _ in range(3)] == [range(4), range(4, 8), range(4)]


def test_waiting_is_counted_by_the_clock() -> None:
    def run(comm: LoopbackComm) -> float:
        ticks = iter(range(1000))
        made = MadePass(SHAPE, [(0, 12)], 2)
        wire = Wire(comm, clock=lambda: float(next(ticks)))
        PassKV(wire).attend(made.queries(comm.rank), made.keys(comm.rank), made.plan)
        return wire.traffic.wait_s

    assert on_ranks(2, run) == [2.0, 2.0]  # one message in and one out


def test_tensors_that_do_not_fit_the_plan_are_refused_before_anything_is_sent() -> None:
    made = MadePass(SHAPE, [(0, 12)], 2)

    def run(comm: LoopbackComm) -> int:
        q, kv = made.queries(comm.rank), made.keys(comm.rank)
        wire = Wire(comm)
        with pytest.raises(RingError, match=rf"gives rank {comm.rank} .* \(6, 6\), found \(5, 6\)"):
            PassKV(wire).attend(q[1:], kv, made.plan)
        with pytest.raises(
            RingError, match="3 query heads of 8 elements cannot share 2 KV heads of 8"
        ):
            PassKV(wire).attend(q[:, 1:], kv, made.plan)
        with pytest.raises(RingError, match=r"cannot share 1\.5 KV heads"):
            PassKV(wire).attend(q[:, 1:], kv[:, 1:], made.plan)
        with pytest.raises(RingError, match="of 7 elements cannot share"):
            PassKV(wire).attend(q[..., 1:], kv, made.plan)
        with pytest.raises(RingError, match="different types"):
            PassKV(wire).attend(q.bfloat16(), kv, made.plan)
        with pytest.raises(RingError, match="plan is for 3 ranks, and there are 2"):
            PassKV(wire).attend(q, kv, MadePass(SHAPE, [(0, 12)], 3).plan)
        return wire.traffic.bytes_sent

    assert on_ranks(2, run) == [0, 0]


def test_rank_that_takes_no_part_is_noticed() -> None:
    made = MadePass(SHAPE, [(0, 12)], 2)
    mail = on_ranks(2, lambda comm: comm)[0]._mail
    lonely = LoopbackComm(0, 2, mail, timeout_s=0.01)
    with pytest.raises(CommError, match="did not arrive"):
        PassKV(Wire(lonely)).attend(made.queries(0), made.keys(0), made.plan)
