"""What context-parallel ranks should send, and where the variants of the ring cross. Pure."""

import math
from collections.abc import Iterable, Mapping

from bench.prefills.works import Span
from engine.config import ModelConfig
from engine.ring import AttentionShape, Load, Variant, choose
from engine.ring.choose import pass_kv_bytes, pass_q_bytes

RANKS = 2
GRAIN = 256
_BYTES = {Variant.PASS_KV: pass_kv_bytes, Variant.PASS_Q: pass_q_bytes}


def shape(config: ModelConfig) -> AttentionShape:
    """Return a layer's attention in bf16 on a rank that has all heads."""
    return AttentionShape(
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        element_bytes=2,
    )


def expected_bytes(config: ModelConfig, chunks: Iterable[Span], ranks: int = RANKS) -> int:
    """Return what all ranks together send where each chunk is a pass of its own.

    The last token's logits, which one rank may send to the first, are left out.
    """
    sizes, found = shape(config), 0
    for span in chunks:
        load = Load(span.end - span.start, span.start)
        found += _BYTES[choose([load], sizes, ranks)](load, sizes, ranks)
    return found * config.num_layers


def hidden_share(wait_s: float, alone_s: float) -> float:
    """Return which part of the messages' own time no rank stood still for.

    Below 0 where ranks waited longer than the messages take: for each other's compute.
    """
    return 1 - wait_s / alone_s


def chosen_crossing(config: ModelConfig, cached: int, most: int) -> int | None:
    """Return the fewest new tokens, up to `most`, from which on pass-KV is chosen."""
    sizes = shape(config)
    found = None
    for new in range(most, 0, -1):
        if choose([Load(new, cached)], sizes, RANKS) is Variant.PASS_Q:
            break
        found = new
    return found


def measured_crossing(kv_s: Mapping[int, float], q_s: Mapping[int, float]) -> float | None:
    """Return the new tokens from which on pass-KV takes no longer, given seconds by new tokens.

    The cut among the counts that is wrong by the least, as one odd figure must not move it far;
    between its two neighbours the logarithm of the times' ratio is taken for a straight line over
    that of the count. The smallest count where pass-KV is the better one everywhere, None where it
    is so nowhere.
    """
    counts = sorted(kv_s)
    lag: dict[int, float] = {new: math.log(kv_s[new] / q_s[new]) for new in counts}

    def wrong_by(cut: int) -> float:
        early = sum(max(0.0, -lag[new]) for new in counts[:cut])
        return early + sum(max(0.0, lag[new]) for new in counts[cut:])

    cut = min(range(len(counts) + 1), key=wrong_by)
    if cut == len(counts):
        return None
    after = counts[cut]
    if cut == 0 or lag[after] == 0:
        return float(after)
    before = counts[cut - 1]
    part = lag[before] / (lag[before] - lag[after])
    return float(before * (after / before) ** part)
