"""The collectives of an instance's ranks over torch process groups: tensors and nothing else.

Nobody waits longer than the group's own time-out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Torch before 2.13 has it by its older name alone, which is deprecated since.
_name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_all_gather: Callable[..., Any] = getattr(dist, _name)


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
        _all_gather(found, _padded(x, part), group=self._group)
        return found[:rows]


class GroupExperts:
    """See parallel.ExpertGroup; `group` is of the ranks that share experts, None the default."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def all_to_all(
        self, x: Tensor, give: Sequence[int] | None = None, take: Sequence[int] | None = None
    ) -> Tensor:
        """See ExpertGroup."""
        found = x.new_empty(len(x) if take is None else sum(take), *x.shape[1:])
        dist.all_to_all_single(
            found,
            x.contiguous(),
            None if take is None else list(take),
            None if give is None else list(give),
            group=self._group,
        )
        return found

    def all_gather(self, x: Tensor) -> Tensor:
        """See ExpertGroup."""
        found = x.new_empty(len(x) * self.size, *x.shape[1:])
        _all_gather(found, x.contiguous(), group=self._group)
        return found

    def all_reduce(self, x: Tensor) -> Tensor:
        """See ExpertGroup."""
        x = x.contiguous()
        dist.all_reduce(x, group=self._group)
        return x

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See ExpertGroup."""
        # An all-to-all sends as many bytes as a reduce-scatter; the order of the sum is then ours.
        first, *more = self.all_to_all(x).chunk(self.size)
        for part in more:
            first += part
        return first


def _padded(x: Tensor, rows: int) -> Tensor:
    """Return `x` with rows of zeros added; such collectives want as many from every rank."""
    if len(x) == rows:
        return x.contiguous()
    more = x.new_zeros(rows, *x.shape[1:])
    more[: len(x)] = x
    return more
