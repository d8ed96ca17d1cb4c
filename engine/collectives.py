"""The collectives of tensor-parallel ranks over a torch process group."""

import torch
import torch.distributed as dist
from torch import Tensor


class GroupCollectives:
    """See parallel.Collectives; `group` is of this rank's instance, None the default one."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._size = dist.get_world_size(group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Collectives."""
        x = x.contiguous()
        if not x.numel():
            return x
        dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        """See Collectives."""
        if not x.shape[0]:
            return x.new_empty(*x.shape[:-1], width)
        part = -(-width // self._size)
        own = x.new_zeros(*x.shape[:-1], part)
        own[..., : x.shape[-1]] = x
        parts = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(parts, own, group=self._group)
        return torch.cat(parts, -1)[..., :width]

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See Collectives."""
        rows = len(x)
        if not rows:
            return x
        part = -(-rows // self._size)
        own = x.new_empty(part, *x.shape[1:])
        dist.reduce_scatter_tensor(own, _padded(x, part * self._size), group=self._group)
        begin = dist.get_rank(self._group) * part
        return own[: max(0, min(part, rows - begin))]

    def all_gather_rows(self, x: Tensor, rows: int) -> Tensor:
        """See Collectives."""
        if not rows:
            return x
        part = -(-rows // self._size)
        found = x.new_empty(part * self._size, *x.shape[1:])
        dist.all_gather_into_tensor(found, _padded(x, part), group=self._group)
        return found[:rows]


def _padded(x: Tensor, rows: int) -> Tensor:
    """Return `x` with rows of zeros added; such collectives want as many from every rank."""
    if len(x) == rows:
        return x.contiguous()
    more = x.new_zeros(rows, *x.shape[1:])
    more[: len(x)] = x
    return more
