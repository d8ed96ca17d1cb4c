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
