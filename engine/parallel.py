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


class Alone:
    """The collectives of one rank."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Collectives."""
        return x

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        """See Collectives."""
        return x


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of tensor, pipeline, context, expert and data parallelism, and this rank's place.

    With cp, tokens are dealt to the ranks in grains of `cp_grain`; see engine.ring.cyclic. Raises
    UnsupportedError for what cannot be run; all but tp and cp must be 1 for now.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1
    tp_rank: int = 0
    cp_rank: int = 0
    cp_grain: int = 0

    def __post_init__(self) -> None:
        for name in ("pp", "ep", "dp"):
            degree = getattr(self, name)
            if degree != 1:
                raise UnsupportedError(
                    f"{name}={degree}: this engine does not split a model so; use {name}=1"
                )
        for name, size, rank in (("tp", self.tp, self.tp_rank), ("cp", self.cp, self.cp_rank)):
            if not 0 <= rank < size:
                raise UnsupportedError(f"rank {rank} of {name}={size} does not exist")
        if self.cp > 1 and self.cp_grain < 1:
            raise UnsupportedError(f"cp={self.cp} needs a grain of whole blocks, found none")

    def check(self, config: ModelConfig) -> None:
        """Raise UnsupportedError, naming the degrees that would do, where tp divides no heads."""
        if not _divides(self.tp, config):
            able = [n for n in range(1, config.num_heads + 1) if _divides(n, config)]
            raise UnsupportedError(
                f"tp={self.tp} does not divide {config.num_heads} query heads, "
                f"{config.num_kv_heads} KV heads and the MLP's inner size; "
                f"use tp={', '.join(map(str, able))}"
            )

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

    def vocab_part(self, vocab_size: int) -> slice:
        """Return which tokens' rows this rank holds; the last ranks may hold fewer."""
        part = -(-vocab_size // self.tp)
        return slice(
            min(self.tp_rank * part, vocab_size), min((self.tp_rank + 1) * part, vocab_size)
        )

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
