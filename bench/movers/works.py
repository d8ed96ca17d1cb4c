"""What is moved, over what, and which slices each round picks. Pure; moves nothing."""

from dataclasses import dataclass

import numpy as np

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How a side splits the cache; context-parallel shares (`cp` > 1) are dealt zigzag."""

    tp: int = 1
    cp: int = 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """The KV of one sequence: for each layer, K and V in blocks [heads, block_size, head_size]."""

    source: Ranks
    target: Ranks
    layers: int = 16
    kv_heads: int = 8
    head_size: int = 128
    dtype: str = "bfloat16"
    element_bytes: int = 2
    tokens: int = 4096
    block_size: int = 32

    @property
    def slice_bytes(self) -> int:
        """Bytes that lie together on both sides: one rank's heads of one block's K or V."""
        heads = self.kv_heads // max(self.source.tp, self.target.tp)
        return heads * self.block_size * self.head_size * self.element_bytes

    @property
    def bytes(self) -> int:
        """All that moves."""
        return 2 * self.layers * self.kv_heads * self.tokens * self.head_size * self.element_bytes


@dataclass(frozen=True, kw_only=True)
class Work:
    """Slices scattered over a pool of `pool_factor` times as many on either side.

    Attributes:
        request: What the slices stand for; None where they are blocks and no more.
        same_layout: Name of the work that moves the same bytes without a reshard, if this is one.
    """

    name: str
    slices: int
    slice_bytes: int
    pool_factor: int = 4
    request: Request | None = None
    same_layout: str | None = None

    @property
    def bytes(self) -> int:
        """All that moves in a round."""
        return self.slices * self.slice_bytes

    @property
    def pool_slices(self) -> int:
        """Slices that a side holds, of which a round picks some."""
        return self.slices * self.pool_factor


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """What carries the bytes; `tls` as UCX_TLS wants it."""

    name: str
    tls: str

    def environment(self) -> dict[str, str]:
        """Variables for every process that uses UCX, so that all of them do it alike."""
        return {
            "UCX_TLS": self.tls,
            # Endpoints with error handling would drop shared memory otherwise.
            "UCX_POSIX_ERROR_HANDLING": "y",
            # The default of 8 KiB costs more than half of the speed.
            "UCX_TCP_TX_SEG_SIZE": "256k",
            "UCX_TCP_RX_SEG_SIZE": "256k",
            # UCX's own default, which ucxx would change for itself alone.
            "UCX_RNDV_THRESH": "auto",
            "UCX_WARN_UNUSED_ENV_VARS": "n",
        }


def _request(name: str, source: Ranks, target: Ranks, same_layout: str | None) -> Work:
    request = Request(source=source, target=target)
    return Work(
        name=name,
        slices=request.bytes // request.slice_bytes,
        slice_bytes=request.slice_bytes,
        # Twice the blocks of 256 MiB are cold enough, and fit a small machine.
        pool_factor=2,
        request=request,
        same_layout=same_layout,
    )


_SAME = "4,096 tokens, same layout"

WORKS = (
    Work(name="256 x 64 KiB", slices=256, slice_bytes=64 * KIB),
    Work(name="32 x 4 MiB", slices=32, slice_bytes=4 * MIB),
    Work(name="2,048 x 8 KiB", slices=2048, slice_bytes=8 * KIB),
    _request(_SAME, Ranks(), Ranks(), None),
    _request("4,096 tokens, tp 1 to tp 2", Ranks(), Ranks(tp=2), _SAME),
    _request("4,096 tokens, tp 2 to tp 1", Ranks(tp=2), Ranks(), _SAME),
    _request("4,096 tokens, cp 2 zigzag to tp 2", Ranks(cp=2), Ranks(tp=2), _SAME),
)

CARRIERS = (
    Carrier(name="tcp", tls="tcp,self"),
    Carrier(name="shm", tls="shm,cma,tcp,self"),
)


def choice(work: Work, number: int) -> tuple[list[int], list[int]]:
    """Return which slices round `number` reads, and which it writes in their turn."""
    random = np.random.default_rng(number)
    sources, targets = (random.permutation(work.pool_slices)[: work.slices] for _ in range(2))
    return sources.tolist(), targets.tolist()
