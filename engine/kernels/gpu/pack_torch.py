"""What `pack` computes, in torch's operators. Legend: as there."""

from torch import Tensor


def pack(
    cache_LCBGPH: Tensor,
    payload: Tensor,
    blocks_U: Tensor,
    subs_U: Tensor,
    heads: slice,
    unit: int,
    tokens: int,
) -> None:
    """Write a box to `payload`, [L, C, U, N, Q, H]; what lies behind its tokens is zero."""
    payload.copy_(_units(cache_LCBGPH, heads, unit)[:, :, blocks_U.long(), subs_U.long()])
    if tokens % unit:
        payload[:, :, -1, :, tokens % unit :] = 0


def unpack(
    cache_LCBGPH: Tensor,
    payload: Tensor,
    blocks_U: Tensor,
    subs_U: Tensor,
    heads: slice,
    unit: int,
    tokens: int,
) -> None:
    """Write a payload to its blocks; the rest of the last unit becomes zero, whatever was sent."""
    units = _units(cache_LCBGPH, heads, unit)
    units[:, :, blocks_U.long(), subs_U.long()] = payload
    if tokens % unit:
        units[:, :, blocks_U[-1], subs_U[-1], :, tokens % unit :] = 0


def _units(cache: Tensor, heads: slice, unit: int) -> Tensor:
    """Return the view [L, C, B, units of a block, N, unit, H] of some heads."""
    split: Tensor = cache[:, :, :, heads].unflatten(4, (-1, unit))
    return split.transpose(3, 4)
