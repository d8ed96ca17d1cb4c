"""How long a prompt takes over context-parallel ranks. Pure arithmetic; measures nothing.

Owns two answers: the time to a prompt's first token on hardware that need not be at hand, from
what a device of it achieves, and over how many ranks a prompt is done soonest, from costs that were
measured where it runs. The first is held against published measurements (`engine.ring.published`).

A cp rank is a host of tp devices, each with its part of every layer; a ring goes from a device to
its like on the next host. All ranks do the same, as they do where tokens are dealt in a zigzag or
cyclically, so the time of one is that of all.
"""

from dataclasses import dataclass, fields

from engine.ring.choose import Load, Variant
from engine.ring.errors import RingError


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the cost of a dense model depends on.

    `weight_bytes` are those of all parameters as they are stored. An element of activations, of
    queries, keys and values has `element_bytes`; one of a partial result that goes home has
    `partial_bytes`.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    parameters: int
    weight_bytes: int
    element_bytes: int
    partial_bytes: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one device achieves, alone and with its neighbours; raises RingError for nonsense.

    Rates are achieved ones, not peaks. `gemm_flops_per_s` stands for all work that grows with the
    tokens and is neither attention nor communication; no pass is faster than reading the weights.
    `link_bytes_per_s` is what a ring all-reduce moves out of a device within its host, `hop_*` a
    message to the next cp rank, `home_*` the exchange of partial results that ends pass-Q.
    `layer_s` is spent in each layer and `step_s` on each hop, whatever the number of tokens, and
    hidden behind nothing: starting kernels and messages, synchronising, merging.
    """

    tp: int
    gemm_flops_per_s: float
    attention_flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    hop_bytes_per_s: float
    hop_latency_s: float
    home_bytes_per_s: float
    home_latency_s: float
    layer_s: float
    step_s: float

    def __post_init__(self) -> None:
        times = {"hop_latency_s", "home_latency_s", "layer_s", "step_s"}
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if value < 0 or (value == 0 and name not in times):
                least = "at least 0" if name in times else "above 0"
                raise RingError(f"{name} must be {least}, found {value}")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The seconds to a first token, by what a rank spends them on.

    `waits_s` are those in which messages between ranks are on their way and nothing is computed,
    `fixed_s` those that do not depend on the number of tokens.
    """

    gemm_s: float
    attention_s: float
    all_reduce_s: float
    waits_s: float
    fixed_s: float

    @property
    def compute_s(self) -> float:
        """Seconds of arithmetic."""
        return self.gemm_s + self.attention_s

    @property
    def total_s(self) -> float:
        """Seconds in all."""
        return self.compute_s + self.all_reduce_s + self.waits_s + self.fixed_s


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """One sequence's new tokens over `ranks` hosts; raises RingError for what cannot be.

    Methods named after a step are the seconds of one device in one layer.
    """

    load: Load
    model: ModelShape
    machine: Machine
    ranks: int

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.load.new < 1 or self.load.cached < 0:
            raise RingError(
                f"a prefill needs at least one rank and one new token, found {self.ranks} ranks "
                f"and {self.load}"
            )
        if self.model.heads % self.machine.tp:
            raise RingError(f"tp {self.machine.tp} does not divide {self.model.heads} heads")

    def estimate(self, variant: Variant) -> Estimate:
        """Return what the prefill takes.

        A hop is hidden behind the attention over the block that is there already; the last block
        has no hop beside it, and what comes home in pass-Q no compute.
        """
        layers, hops = self.model.layers, self.ranks - 1
        wait_s = hops * max(0.0, self.hop_s(variant) - self.block_s())
        if variant is Variant.PASS_Q:
            wait_s += self.home_s()
        return Estimate(
            gemm_s=self._gemm_s(),
            attention_s=layers * self.ranks * self.block_s(),
            all_reduce_s=layers * 2 * self._all_reduce_s(),
            waits_s=layers * wait_s,
            fixed_s=layers * (self.machine.layer_s + hops * self.machine.step_s),
        )

    def block_s(self) -> float:
        """Return the attention of a rank's queries over the keys of one rank.

        Two products of two operations each. Of the new tokens' scores a causal mask leaves half.
        """
        scores = self._new * (self.load.cached + self.load.new / 2) / self.ranks
        flops = 4 * scores * self._heads * self.model.head_size
        return flops / self.machine.attention_flops_per_s

    def hop_s(self, variant: Variant) -> float:
        """Return one message to the next rank: its keys and values, or its queries."""
        if variant is Variant.PASS_KV:
            rows = (self.load.new + self.load.cached) / self.ranks * 2 * self._kv_heads
        else:
            rows = self._new * self._heads
        message = rows * self.model.head_size * self.model.element_bytes
        return self.machine.hop_latency_s + message / self.machine.hop_bytes_per_s

    def home_s(self) -> float:
        """Return the exchange of pass-Q's partial results, each with its lse; 0 for one rank."""
        if self.ranks == 1:
            return 0.0
        partial = self._new * self._heads * (self.model.head_size + 1) * self.model.partial_bytes
        home = (self.ranks - 1) * partial / self.machine.home_bytes_per_s
        return self.machine.home_latency_s + home

    @property
    def _new(self) -> float:
        return self.load.new / self.ranks

    @property
    def _heads(self) -> int:
        return self.model.heads // self.machine.tp

    @property
    def _kv_heads(self) -> int:
        return -(-self.model.kv_heads // self.machine.tp)  # replicated where tp exceeds them

    def _gemm_s(self) -> float:
        flops = 2 * self.model.parameters * self._new / self.machine.tp
        read_s = self.model.weight_bytes / self.machine.tp / self.machine.memory_bytes_per_s
        return max(flops / self.machine.gemm_flops_per_s, read_s)

    def _all_reduce_s(self) -> float:
        """Return one all-reduce of the activations: once round to sum, once to hand out."""
        tp = self.machine.tp
        activations = self._new * self.model.hidden * self.model.element_bytes
        return 2 * (tp - 1) / tp * activations / self.machine.link_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class SplitCosts:
    """What a prompt costs on the ranks of an instance; raises RingError for nonsense.

    One rank alone takes `token_s` * tokens + `pair_s` * tokens**2 over all layers. A hop takes
    `hop_s` in each of `layers`, hidden behind nothing, and carries `token_bytes` (keys and values
    in one layer) of each of a rank's tokens at `bytes_per_s` beside the attention.
    """

    token_s: float
    pair_s: float
    layers: int
    hop_s: float
    token_bytes: int
    bytes_per_s: float

    def __post_init__(self) -> None:
        if min(self.token_s, self.pair_s, self.hop_s, self.token_bytes) < 0:
            raise RingError(f"costs must be at least 0, found {self}")
        if self.layers < 1 or self.bytes_per_s <= 0:
            raise RingError(f"layers and bytes_per_s must be above 0, found {self}")


def split_s(tokens: int, costs: SplitCosts, ranks: int) -> float:
    """Return the seconds of a prompt of so many tokens over `ranks` ranks, in pass-KV."""
    each = tokens / ranks
    block_s = costs.pair_s * each**2
    transfer_s = costs.layers * each * costs.token_bytes / costs.bytes_per_s
    hop_s = costs.layers * costs.hop_s + max(0.0, transfer_s - block_s)
    return costs.token_s * each + ranks * block_s + (ranks - 1) * hop_s


def ranks_for(tokens: int, costs: SplitCosts, ranks: int) -> int:
    """Return over how many of `ranks` ranks a prompt is done soonest, the fewest where alike.

    Never fewer for more tokens: of two counts of ranks, the seconds that the greater one saves are
    not above zero for an empty prompt, convex in the tokens until it hides its hops, and only grow
    from there on; so once above zero they stay there. Raises RingError for less than one rank or a
    negative length.
    """
    if ranks < 1 or tokens < 0:
        raise RingError(
            f"a split needs at least one rank and no negative length, found {ranks} "
            f"ranks and {tokens} tokens"
        )
    return min(range(1, ranks + 1), key=lambda count: split_s(tokens, costs, count))
