"""How an instance splits a model over ranks. Owns the arithmetic of shards, no processes.

Layers ask the layout which part of a dimension is theirs, and `Collectives` to join what the
ranks made of their parts.
"""

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


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of tensor, pipeline, context, expert and data parallelism, and this rank's place.

    With cp, tokens are dealt to the ranks in grains of `cp_grain`, 0 while that is not chosen; see
    engine.ring.cyclic. With `sequence_parallel` each tp rank has some rows of the residual stream;
    see engine.layers.stream. Raises UnsupportedError for what cannot be run; ep and dp must be 1
    for now.
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
        for name in ("ep", "dp"):
            degree = getattr(self, name)
            if degree != 1:
                raise UnsupportedError(
                    f"{name}={degree}: this engine does not split a model so; use {name}=1"
                )
        places = (
            ("tp", self.tp, self.tp_rank),
            ("cp", self.cp, self.cp_rank),
            ("pp", self.pp, self.pp_rank),
        )
        for name, size, rank in places:
            if not 0 <= rank < size:
                raise UnsupportedError(f"rank {rank} of {name}={size} does not exist")
        if self.cp_grain < 0:
            raise UnsupportedError(f"a grain has whole blocks, found {self.cp_grain} tokens")

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
                f"{config.num_kv_heads} KV heads and the MLP's inner size; "
                f"use tp={', '.join(map(str, able))}"
            )
        if self.pp > config.num_layers:
            raise UnsupportedError(
                f"pp={self.pp} needs a layer for each stage; the model has {config.num_layers}: "
                f"use pp=1 to {config.num_layers}"
            )

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

    def expert_part(self, experts: int) -> slice:
        """Return which of `experts` this rank holds."""
        return slice(0, experts // self.ep)


def _divides(tp: int, config: ModelConfig) -> bool:
    kv_heads = config.num_kv_heads
    if config.num_heads % tp or (kv_heads % tp and tp % kv_heads):
        return False
    sizes = [config.intermediate_size] if config.has_dense_mlp else []
    if config.moe is not None:
        sizes.append(config.moe.intermediate_size)
    return all(size % tp == 0 for size in sizes)
