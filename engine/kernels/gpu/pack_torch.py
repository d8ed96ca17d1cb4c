"""What `pack` computes, in torch's operators. Legend: as there."""

from torch import Tensor

from engine.kernels.gpu.options import Units


def move(
    into: Tensor, source: Tensor, to: Units | None, at: Units | None, unit: int, tokens: int
) -> None:
    """Write a box, where it is `at` in one memory, to where it belongs in another.

    None for a payload's place. What lies behind the last token of the last unit becomes zero.
    """
    box = source if at is None else _units(source, at, unit)[:, :, at.blocks_U, at.subs_U]
    if to is None:
        into.copy_(box)
        if tokens % unit:
            into[:, :, -1, :, tokens % unit :] = 0
        return
    units = _units(into, to, unit)
    units[:, :, to.blocks_U, to.subs_U] = box
    if tokens % unit:
        units[:, :, to.blocks_U[-1], to.subs_U[-1], :, tokens % unit :] = 0


def _units(memory: Tensor, box: Units, unit: int) -> Tensor:
    """Return the view [L, C, B, units of a block, N, unit, H] of a box's heads."""
    split: Tensor = memory[:, :, :, box.heads].unflatten(4, (-1, unit))
    return split.transpose(3, 4)
