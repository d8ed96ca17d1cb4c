"""Which variant a pass should use. Pure arithmetic over token counts and sizes; measures nothing.

After arXiv 2411.01783, section 3.4: keys and values of a token are small beside its queries where
heads share them, but with a long cached prefix there are many more of them. The paper's rule,
pass-KV where new / (new + cached) >= 2 * kv_heads / heads, counts the queries alone; here what
comes home in pass-Q is counted too, in fp32 as it travels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

_PARTIAL_BYTES = 4  # of an element of a partial result, fp32


class Variant(Enum):
    """What goes round the ring."""

    PASS_KV = "pass-kv"
    PASS_Q = "pass-q"


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One layer's attention on a rank; `window` as in a `RingPlan`.

    `planes` are 2 for keys and values, 1 where a token's key is its value as well.
    """

    heads: int
    kv_heads: int
    head_size: int
    element_bytes: int
    window: int | None = None
    planes: int = 2

    @property
    def key_bytes(self) -> int:
        """Bytes of a token's keys and values."""
        return self.planes * self.kv_heads * self.head_size * self.element_bytes

    def keys(self, load: "Load") -> int:
        """Return how many tokens, cached and new, the new ones may look at."""
        if not load.new:
            return 0
        reach = load.cached if self.window is None else min(load.cached, self.window - 1)
        return load.new + reach


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a rank can do: attention's arithmetic, and sending to one other rank."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Load:
    """New and cached tokens of one sequence of a pass."""

    new: int
    cached: int


def pass_kv_bytes(load: Load, shape: AttentionShape, ranks: int) -> int:
    """Return what all ranks together send in pass-KV, or where all gather K and V, in a layer.

    Each key and value that a new token may look at makes ranks - 1 hops.
    """
    return (ranks - 1) * shape.keys(load) * shape.key_bytes


def pass_q_bytes(load: Load, shape: AttentionShape, ranks: int) -> int:
    """Return what all ranks together send in pass-Q, in a layer.

    Each query makes ranks - 1 hops, and as many partial results, with their lse, come home.
    """
    query = shape.head_size * shape.element_bytes
    home = (shape.head_size + 1) * _PARTIAL_BYTES
    return (ranks - 1) * load.new * shape.heads * (query + home)


def choose(
    loads: Iterable[Load], shape: AttentionShape, ranks: int, speeds: Speeds | None = None
) -> Variant:
    """Return the variant that sends less or, where speeds are known, whose ranks wait less.

    The same on every rank that is asked the same. With `speeds`, a hop that takes no longer than
    the compute beside it costs nothing, but what comes home last has no compute beside it; a tie
    is decided by bytes.
    """
    loads = tuple(loads)
    kv_bytes = sum(pass_kv_bytes(load, shape, ranks) for load in loads)
    q_bytes = sum(pass_q_bytes(load, shape, ranks) for load in loads)
    if speeds is not None:
        kv_s, q_s = _waits(loads, shape, ranks, speeds)
        if kv_s != q_s:
            return Variant.PASS_KV if kv_s < q_s else Variant.PASS_Q
    return Variant.PASS_KV if kv_bytes <= q_bytes else Variant.PASS_Q


def _waits(
    loads: tuple[Load, ...], shape: AttentionShape, ranks: int, speeds: Speeds
) -> tuple[float, float]:
    """Return the seconds that a rank waits in pass-KV and in pass-Q."""
    hops = ranks - 1
    scores = sum(load.new * shape.keys(load) for load in loads)
    # Two products of two operations each; the causal mask is left out, as in the paper.
    compute_s = 4 * scores * shape.heads * shape.head_size / ranks**2 / speeds.flops_per_s
    each = ranks * speeds.bytes_per_s  # a rank's share of the tokens, over its link
    tokens = sum(map(shape.keys, loads))
    new = sum(load.new for load in loads)
    kv_s = tokens * shape.key_bytes / each
    q_s = new * shape.heads * shape.head_size * shape.element_bytes / each
    home_s = new * shape.heads * (shape.head_size + 1) * _PARTIAL_BYTES / each
    return hops * max(0.0, kv_s - compute_s), hops * (max(0.0, q_s - compute_s) + home_s)
