"""Process groups that many cases share: one that is made anew for each has connections to make."""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)


class Groups:
    """The process groups of the ranks that differ in some of their places only; made once each."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def mine(self, rank: int, lines: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
        """Return the group of `rank`'s line; all ranks of the world call it with all lines."""
        found = None
        for line in lines:
            members = tuple(int(each) for each in line)
            if members not in self._made:
                self._made[members] = dist.new_group(list(members), timeout=TIMEOUT)
            if rank in members:
                found = self._made[members]
        return found
