"""What kernels are asked for, whatever the device's form of them. Computes nothing but ranges.

Legend: T query rows, L key rows, U units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How a new token looks at its sequence.

    Attributes:
        scale: 1 where queries are scaled already.
        window: A query sees itself and the window - 1 tokens before it; None: all.
        soft_cap: A score is cap * tanh(score / cap); None: the score.
        split_tokens: Keys of a part, so that a row does not depend on the batch; None: as many as
            suit the device.
    """

    scale: float = 1.0
    window: int | None = None
    soft_cap: float | None = None
    split_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("window", "soft_cap", "split_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive, or None for none")


@dataclass(frozen=True)
class Seen:
    """Which key rows each query row looks at: from `low_T` to before `high_T`, both int32.

    Neither may fall from one row to the next. `end` is the last `high_T`, or more. Rows between the
    first low and the last high must hold keys, even where no query looks.
    """

    low_T: Tensor
    high_T: Tensor
    end: int


def causal(
    tokens: int, keys: int, offset: int, device: torch.device, window: int | None = None
) -> Seen:
    """Return what query t sees when it is at the position of key `offset` + t: keys up to that.

    The offset may be negative, or beyond the keys.
    """
    at_T = torch.arange(offset, offset + tokens, device=device, dtype=torch.int32)
    high_T = (at_T + 1).clamp(0, keys)
    low_T = torch.zeros_like(at_T) if window is None else (at_T - window + 1).clamp(0, keys)
    return Seen(low_T, high_T, max(0, min(keys, offset + tokens)))


def full(tokens: int, keys: int, device: torch.device) -> Seen:
    """Return what queries see that may look at all keys."""
    low_T = torch.zeros(tokens, device=device, dtype=torch.int32)
    return Seen(low_T, torch.full_like(low_T, keys), keys)


@dataclass(frozen=True)
class Units:
    """Where some heads' units lie in a cache: unit u is the part `subs_U[u]` of `blocks_U[u]`."""

    blocks_U: Tensor
    subs_U: Tensor
    heads: slice
