"""What a split is expected to do at the rate that was asked for. Pure."""

from dataclasses import dataclass

from planner.options import Question
from planner.pools import DecodePool, PrefillPool
from planner.search import Split, request_kv_bytes


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Figures at one rate; None for times without end, where a pool cannot keep up.

    Attributes:
        prefill_median_s: A median prompt's time without its wait.
        decode_batch: Mean sequences of an instance.
        transfer_bytes_per_s: KV from pool to pool.
    """

    attainment: float
    prefill_median_s: float
    prefill_mean_wait_s: float | None
    decode_batch: float | None
    tpot_s: float | None
    transfer_bytes_per_s: float
    transfer_bytes_per_s_per_prefill_device: float
    transfer_bytes_per_s_per_decode_device: float


def expect(question: Question, split: Split) -> Expected:
    """Return what both pools do at the question's rate."""
    rate = question.workload.rate_per_s
    prefills, decodes = split.prefill.count, split.decode.count
    prefill, decode = split.prefill.option.pool, split.decode.option.pool
    assert isinstance(prefill, PrefillPool)
    assert isinstance(decode, DecodePool)
    wait = prefill.wait(rate, prefills)
    batch = decode.batch(rate, decodes)
    sent = rate * request_kv_bytes(question)
    return Expected(
        attainment=prefill.attainment(rate, prefills) * decode.attainment(rate, decodes),
        prefill_median_s=float(prefill.first_s[len(prefill.first_s) // 2]),
        prefill_mean_wait_s=None if wait is None else wait.chance * wait.mean_s,
        decode_batch=batch,
        tpot_s=None if batch is None else decode.step_s(batch),
        transfer_bytes_per_s=sent,
        transfer_bytes_per_s_per_prefill_device=sent / split.prefill.devices,
        transfer_bytes_per_s_per_decode_device=sent / split.decode.devices,
    )
