"""Measurements of context-parallel prefill that others have published, and a model fitted to them.

Owns figures and where they are from; the arithmetic is in `engine.ring.model`. All are from arXiv
2411.01783, version 3 (Meta): Llama 3 405B on hosts of eight H100s, tp 8 within a host and cp over
hosts, one sequence at a time. "GTT" hosts have RDMA with 400 Gb/s a GPU, "GTI" hosts TCP with 100.

The paper writes lengths as 8K, 128K and 1M. Its Table 4 has 128,000 tokens and its appendix A
counts 1M as 10**6, so 8K and 32K are taken to be decimal, too.
"""

from dataclasses import dataclass, replace

from engine.ring.choose import Load, Variant
from engine.ring.model import Machine, ModelShape

LLAMA_3_405B = ModelShape(
    # Table 9.
    layers=126,
    hidden=16384,
    heads=128,
    kv_heads=8,
    head_size=128,
    parameters=405_000_000_000,
    # Section 4.1 has FP8 in the feed-forward layers: three matrices of 16,384 x 53,248 in each,
    # 330e9 parameters. That the others have two bytes each is assumed.
    weight_bytes=480_000_000_000,
    element_bytes=2,
    partial_bytes=2,  # appendix C has one element size for everything
)


@dataclass(frozen=True)
class FirstToken:
    """Seconds to the first token of a load over some hosts; `fitted` where a parameter is from it.

    What is not fitted is what the model is held against.
    """

    ranks: int
    load: Load
    variant: Variant
    seconds: float
    fitted: bool = False


@dataclass(frozen=True)
class RingStep:
    """Seconds of one message, one block of attention and, in pass-Q, the exchange at the end."""

    load: Load
    variant: Variant
    hop_s: float
    block_s: float
    home_s: float | None


# Table 5: 4 GTT hosts, 128,000 tokens of which 2.5% and 10% are new.
RING_STEPS = (
    RingStep(Load(3_200, 124_800), Variant.PASS_KV, 627e-6, 414e-6, None),
    RingStep(Load(3_200, 124_800), Variant.PASS_Q, 166e-6, 414e-6, 424e-6),
    RingStep(Load(12_800, 115_200), Variant.PASS_KV, 631e-6, 1608e-6, None),
    RingStep(Load(12_800, 115_200), Variant.PASS_Q, 544e-6, 1608e-6, 1023e-6),
)

# GTT hosts, nothing cached, pass-KV.
FULL_PREFILL = tuple(
    FirstToken(ranks, Load(tokens, 0), Variant.PASS_KV, seconds, fitted)
    for ranks, tokens, seconds, fitted in (
        (1, 8_000, 1.740, True),  # Table 6, as the next five
        (1, 32_000, 7.658, False),
        (1, 128_000, 42.010, True),
        (2, 8_000, 0.999, False),
        (2, 32_000, 4.015, False),
        (2, 128_000, 21.042, False),
        (4, 128_000, 10.950, False),  # Table 7
        (8, 128_000, 5.85, True),  # section 4.2.1
        (16, 128_000, 3.8, False),  # section 4.2.3, as the next
        (16, 1_000_000, 77.0, False),
    )
)

# Table 4: 4 GTT hosts, 128,000 tokens in all: new ones, milliseconds in pass-KV and in pass-Q.
_TABLE_4 = (
    (1_280, 1023.39, 898.71),
    (3_200, 1110.18, 1046.43),
    (4_160, 1298.92, 1280.10),
    (6_400, 1305.56, 1302.01),
    (12_800, 2080.67, 2205.27),
    (25_600, 3353.02, 3617.02),
    (38_400, 4629.23, 4922.52),
    (51_200, 5745.08, 6217.83),
    (64_000, 6845.21, 7367.99),
    (76_800, 7890.35, 8468.66),
    (89_600, 8697.27, 9666.62),
    (102_400, 10105.78, 10652.39),
    (115_200, 11136.40, 11571.62),
    (128_000, 11462.15, 12360.57),
)
CACHED_PREFILL = tuple(
    FirstToken(
        4,
        Load(new, 128_000 - new),
        variant,
        milliseconds / 1e3,
        fitted=new == 3_200 and variant is Variant.PASS_KV,
    )
    for new, kv_ms, q_ms in _TABLE_4
    for variant, milliseconds in ((Variant.PASS_KV, kv_ms), (Variant.PASS_Q, q_ms))
)

GTT = Machine(
    tp=8,
    # From 128K tokens on one host, what is left of it after attention and all-reduces.
    gemm_flops_per_s=658e12,
    # From Table 5's block of 10%. Appendix A has 540e12 for the kernel alone, and 502e12 for 1M
    # tokens on sixteen hosts, all work together.
    attention_flops_per_s=496e12,
    memory_bytes_per_s=2.4e12,  # section 4.1, a peak
    # Assumed: four fifths of the 450 GB/s that NVLink 4 moves in one direction. No figure of the
    # paper tells it from the GEMMs' rate, which is fitted beside it.
    link_bytes_per_s=360e9,
    # From Table 5's messages of pass-Q, two of each sort: a line through two points.
    hop_bytes_per_s=26e9,
    hop_latency_s=40e-6,
    home_bytes_per_s=49.6e9,
    home_latency_s=224e-6,
    layer_s=0.96e-3,  # from 8K tokens on one host
    step_s=0.56e-3,  # from 128K tokens on eight
)

# The runs of Table 4 take longer by about 0.3 s whatever is new, even where all is: 128K tokens on
# four hosts take 11.46 s there and 10.95 s in Table 7. The paper does not say why. From one row.
GTT_CACHED = replace(GTT, layer_s=3.5e-3)

# Section 4.2.1 has 3 GB/s a rank, seen in a trace; the exchange at the end is assumed to be alike.
GTI = replace(GTT, hop_bytes_per_s=3e9, home_bytes_per_s=3e9)
