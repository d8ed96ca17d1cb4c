"""How an instance splits a model over ranks. Owns the arithmetic of shards, no processes.

Layers ask the layout which part of a dimension is theirs, and `Collectives` to join what the
ranks made of their parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.config import ModelConfig
from engine.errors import UnsupportedError


class Collectives(Protocol):
    """What the tensor-parallel ranks of an instance do together; every rank calls it."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks, in place."""
        ...

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        """Return all ranks' columns side by side, [..., width], in the order of the ranks.

        Every rank's `x` has ceil(width / ranks) columns but the last ones', which may have less.
        """
        ...

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return this rank's rows of the sum over the ranks, as `Layout.ragged_part` has them."""
        ...

    def all_gather_rows(self, x: Tensor, rows: int) -> Tensor:
        """Return all ranks' rows, `rows` in all, in the order of the ranks."""
        ...


class Alone:
    """The collectives of one rank."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Collectives."""
        return x

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        """See Collectives."""
        return x

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See Collectives."""
        return x

    def all_gather_rows(self, x: Tensor, rows: int) -> Tensor:
        """See Collectives."""
        return x


class ExpertGroup(Protocol):
    """What the ranks that share a stage's experts do together; every one of them calls it.

    These are `Layout.expert_ranks` ranks, in the order of `Layout.expert_rank`.
    """

    size: int
    rank: int

    def all_to_all(
        self, x: Tensor, give: Sequence[int] | None = None, take: Sequence[int] | None = None
    ) -> Tensor:
        """Send each rank its rows of `x`, and return what all ranks sent to this one, in order.

        Rank r gets `give[r]` rows and `take[r]` come from it; without them, equal parts.
        """
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Return all ranks' rows, in the order of the ranks; each has as many."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks, in place."""
        ...

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return this rank's equal part of the rows of the sum, made in the order of the ranks."""
        ...


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of tensor, pipeline, context, expert and data parallelism, and this rank's place.

    An instance's ranks are in the order dp, pp, cp, tp, the last one fastest. With cp, tokens are
    dealt to the ranks in grains of `cp_grain`, 0 while that is not chosen; see engine.ring.cyclic.
    With `sequence_parallel` each tp rank has some rows of the residual stream; see
    engine.layers.stream.

    Each dp rank has sequences and a cache of its own, and all weights but the experts'. Those of a
    stage are split over all its dp * tp ranks, dp first: into `ep` parts of whole experts, and
    within each by inner size over `etp` neighbours. Raises UnsupportedError for what cannot be run.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1
    tp_rank: int = 0
    cp_rank: int = 0
    pp_rank: int = 0
    dp_rank: int = 0
    cp_grain: int = 0
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        places = (
            ("dp", self.dp, self.dp_rank),
            ("tp", self.tp, self.tp_rank),
            ("cp", self.cp, self.cp_rank),
            ("pp", self.pp, self.pp_rank),
        )
        for name, size, rank in places:
            if not 0 <= rank < size:
                raise UnsupportedError(f"rank {rank} of {name}={size} does not exist")
        if self.cp_grain < 0:
            raise UnsupportedError(f"a grain has whole blocks, found {self.cp_grain} tokens")
        if self.ep < 1 or self.expert_ranks % self.ep:
            raise UnsupportedError(
                f"ep={self.ep} does not divide the {self.expert_ranks} ranks of dp={self.dp} x "
                f"tp={self.tp} that share the experts; use ep={_listed(_divisors(self))}"
            )
        if self.ep == self.dp == 1:
            return
        other = f"with ep={self.ep} and dp={self.dp} it must be"
        if self.cp > 1:
            raise UnsupportedError(f"cp={self.cp}: {other} 1; cp goes with ep=1 and dp=1")
        if self.sequence_parallel:
            raise UnsupportedError(f"sequence parallelism: {other} off")

    @property
    def grain_is_open(self) -> bool:
        """Whether a grain is needed and not chosen yet."""
        return self.cp > 1 and not self.cp_grain

    def check(self, config: ModelConfig) -> None:
        """Raise UnsupportedError, naming the degrees that would do, for those that do not."""
        if not _divides(self.tp, config):
            able = [n for n in range(1, config.num_heads + 1) if _divides(n, config)]
            raise UnsupportedError(
                f"tp={self.tp} does not divide {config.num_heads} query heads, "
                f"{config.num_kv_heads} KV heads and the MLP's inner size; use tp={_listed(able)}"
            )
        self._check_experts(config)
        if self.pp > config.num_layers:
            raise UnsupportedError(
                f"pp={self.pp} needs a layer for each stage; the model has {config.num_layers}: "
                f"use pp=1 to {config.num_layers}"
            )

    def _check_experts(self, config: ModelConfig) -> None:
        moe = config.moe
        if moe is None:
            if self.ep > 1:
                raise UnsupportedError(f"ep={self.ep}: the model has no experts; use ep=1")
            return
        able = [
            ep
            for ep in _divisors(self)
            if ep <= moe.num_experts and moe.intermediate_size % (self.expert_ranks // ep) == 0
        ]
        if self.ep not in able:
            raise UnsupportedError(
                f"ep={self.ep} over {self.expert_ranks} ranks of dp={self.dp} x tp={self.tp}: each "
                f"part needs one of the {moe.num_experts} experts, and its {self.etp} ranks must "
                f"divide their inner size of {moe.intermediate_size}; use "
                + (f"ep={_listed(able)}, or " if able else "")
                + "another dp or tp"
            )

    @property
    def ranks(self) -> int:
        """Ranks of the instance."""
        return self.dp * self.pp * self.cp * self.tp

    @property
    def rank(self) -> int:
        """This rank's number in the instance."""
        return ((self.dp_rank * self.pp + self.pp_rank) * self.cp + self.cp_rank) * (
            self.tp
        ) + self.tp_rank

    @property
    def expert_ranks(self) -> int:
        """Ranks that share the experts of a stage."""
        return self.dp * self.tp

    @property
    def expert_rank(self) -> int:
        """This rank's number among those."""
        return self.dp_rank * self.tp + self.tp_rank

    @property
    def etp(self) -> int:
        """Ranks that share the inner size of each of their experts: neighbours."""
        return self.expert_ranks // self.ep

    @property
    def ep_rank(self) -> int:
        """Which of the `ep` parts of the experts this rank has, with others if etp > 1."""
        return self.expert_rank // self.etp

    def layers(self, num_layers: int) -> range:
        """Return which layers this rank's stage has; stages differ by one at most."""
        return range(
            num_layers * self.pp_rank // self.pp, num_layers * (self.pp_rank + 1) // self.pp
        )

    def most_layers(self, num_layers: int) -> int:
        """Return how many layers the stages have at most."""
        return -(-num_layers // self.pp)

    def tensor_part(self, size: int) -> slice:
        """Return which of `size` rows, columns or heads this rank holds; tp divides them."""
        part = size // self.tp
        return slice(self.tp_rank * part, (self.tp_rank + 1) * part)

    def kv_part(self, kv_heads: int) -> slice:
        """Return which KV heads this rank holds: beyond one for each, ranks share them."""
        if self.tp <= kv_heads:
            return self.tensor_part(kv_heads)
        head = self.tp_rank * kv_heads // self.tp
        return slice(head, head + 1)

    def ragged_part(self, size: int) -> slice:
        """Return which of `size` rows this tp rank has; the last ranks may have fewer."""
        part = -(-size // self.tp)
        return slice(min(self.tp_rank * part, size), min((self.tp_rank + 1) * part, size))

    def expert_part(self, experts: int, ep_rank: int | None = None) -> range:
        """Return which of `experts` this or another part has; parts differ by one at most."""
        at = self.ep_rank if ep_rank is None else ep_rank
        return range(experts * at // self.ep, experts * (at + 1) // self.ep)

    def expert_inner_part(self, size: int) -> slice:
        """Return which of an expert's inner elements this rank has; etp divides them."""
        part, at = size // self.etp, self.expert_rank % self.etp
        return slice(at * part, (at + 1) * part)


def _divides(tp: int, config: ModelConfig) -> bool:
    kv_heads = config.num_kv_heads
    if config.num_heads % tp or (kv_heads % tp and tp % kv_heads):
        return False
    if config.moe is not None and config.moe.shared_size % tp:
        return False
    return not config.has_dense_mlp or config.intermediate_size % tp == 0


def _divisors(layout: Layout) -> list[int]:
    """Return the ep that divide the ranks which share experts."""
    return [ep for ep in range(1, layout.expert_ranks + 1) if layout.expert_ranks % ep == 0]


def _listed(degrees: Sequence[int]) -> str:
    return ", ".join(map(str, degrees))
