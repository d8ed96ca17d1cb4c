from collections.abc import Sequence

import pytest

from planner.costs import Chunk
from planner.pools import DecodePool, PrefillPool, Slo
from planner.workload import Workload, steady

SLO = Slo(ttft_s=1.0, tpot_s=0.05, attainment=0.9)
LOAD = steady(1000, 101, 1.0)


class PlainCosts:
    """A millisecond for each token of a prompt and each sequence of a step."""

    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        return 1e-3 * sum(chunk.tokens for chunk in chunks)

    def prefill_busy_s(self, chunks: Sequence[Chunk]) -> float:
        return self.prefill_s(chunks)

    def decode_step_s(self, batch: int, context_tokens: float) -> float:
        return 10e-3 + 1e-3 * batch

    def mixed_step_s(self, chunks: Sequence[Chunk], batch: int, context_tokens: float) -> float:
        return self.prefill_s(chunks) + self.decode_step_s(batch, context_tokens)

    def transfer_s(self, tokens: int) -> float:
        return 0.0


def decode(kv_tokens: int = 10**9, max_batch: int = 1000, load: Workload = LOAD) -> DecodePool:
    return DecodePool(PlainCosts(), load, SLO, kv_tokens=kv_tokens, max_batch=max_batch)


@pytest.mark.parametrize(
    ("kv_tokens", "max_batch", "most"), [(10**9, 1000, 40), (10**9, 30, 30), (11_010, 1000, 10)]
)
def test_decode_is_bound_by_its_limit_its_batch_or_its_room(
    kv_tokens: int, max_batch: int, most: int
) -> None:
    assert decode(kv_tokens, max_batch).most == most


def test_the_mean_batch_is_what_brings_as_many_tokens_as_arrive() -> None:
    pool = decode()
    batch = pool.batch(rate_per_s=6.0, instances=1)
    assert batch is not None
    assert batch / pool.step_s(batch) == pytest.approx(6.0 * 100, rel=0.01)
    assert (pool.batch(6.0, instances=2) or 0.0) < batch
    assert pool.batch(rate_per_s=11.0, instances=1) is None  # a step brings 1,000 tokens/s at most
    assert pool.attainment(11.0, 1) == 0


def test_decode_sustains_as_many_times_the_rate_with_as_many_instances() -> None:
    pool = decode()
    assert pool.goodput(3) == pytest.approx(3 * pool.goodput(1))
    assert pool.attainment(pool.goodput(1), 1) == pytest.approx(SLO.share_of_each, abs=0.01)


def test_room_for_nothing_is_said() -> None:
    assert "no room for one mean request" in (decode(kv_tokens=100).too_slow() or "")
    assert decode(kv_tokens=100).goodput(1) == 0
    slow = DecodePool(
        PlainCosts(),
        LOAD,
        Slo(ttft_s=1.0, tpot_s=0.005, attainment=0.9),
        kv_tokens=10**9,
        max_batch=10,
    )
    assert slow.too_slow() == "a step of one sequence takes 11.0 ms, more than 5 ms"


def test_prefill_gains_more_than_its_share_from_another_instance() -> None:
    pool = PrefillPool(PlainCosts(), steady(300, 10, 1.0), SLO)
    assert pool.too_slow() is None
    assert pool.goodput(2) > 2 * pool.goodput(1) > 0
    assert pool.attainment(pool.goodput(2), 2) == pytest.approx(SLO.share_of_each, abs=0.001)
    assert pool.attainment(4.0, 1) == 0


def test_prompts_that_are_late_even_alone_are_counted() -> None:
    pool = PrefillPool(PlainCosts(), steady(2000, 10, 1.0), SLO)
    assert pool.too_slow() == (
        "100% of prompts take more than 1,000 ms even alone; 1 in 20 takes 2,000 ms"
    )
    assert pool.goodput(4) == 0
