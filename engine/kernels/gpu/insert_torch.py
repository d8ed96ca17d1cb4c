"""What `insert` computes, in torch's operators. Legend: as there."""

from torch import Tensor

from engine.kernels.rows import NormWeight


def rotate_insert(
    qkv_TYH: Tensor,
    norm: NormWeight,
    cos_T1H: Tensor,
    sin_T1H: Tensor,
    cells: Tensor,
    slots_TX: Tensor,
) -> None:
    """Normalise and turn the query and key heads in place; write keys and values to the cache.

    Heads whose slot is no row of `cells` are turned but not written.
    """
    kv_heads = slots_TX.shape[1]
    turned_TMH = qkv_TYH[:, : qkv_TYH.shape[1] - kv_heads // 2]
    wide = turned_TMH.to(norm.weight.dtype)
    if norm.normalises:
        wide = wide / (wide.square().sum(-1, keepdim=True) + norm.floor_squared).sqrt()
    wide = wide * norm.weight
    swapped = wide.roll(wide.shape[-1] // 2, dims=-1)
    turned_TMH.copy_(wide * cos_T1H + swapped * sin_T1H)
    kept_TX = (slots_TX >= 0) & (slots_TX < len(cells))
    new = qkv_TYH[:, qkv_TYH.shape[1] - kv_heads :]
    cells[slots_TX[kept_TX]] = new[kept_TX].to(cells.dtype)
