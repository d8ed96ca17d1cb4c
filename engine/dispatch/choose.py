"""Which dispatcher a step takes: measured where the instance runs, or set.

Owns the table from a step's bucket to a dispatcher. All ranks that share experts measure at the
same time and use the slowest rank's figures: so all choose alike.
"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.dispatch.dispatcher import Dispatcher, Members, PairExperts, Router
from engine.dispatch.gathered import AllGather
from engine.dispatch.packed import PackedAllToAll
from engine.dispatch.padded import PaddedAllToAll, bucket_of
from engine.errors import UnsupportedError
from engine.parallel import Collectives, ExpertGroup, Layout
from engine.ring.calibrate import Stopwatch

AUTO = "auto"
DISPATCHERS: Mapping[str, Callable[[Members], Dispatcher]] = {
    "allgather": AllGather,
    "alltoall": PackedAllToAll,
    "padded": PaddedAllToAll,
}

# Makes a pass of so many rows through some layer by a dispatcher, to be run several times.
Trial = Callable[[Dispatcher, int], Callable[[], object]]


class Dispatch:
    """All dispatchers of an instance, and the choice among them; itself one, see Dispatcher.

    `setting` is the name of one, or "auto": then steps all-gather until `measure` knows better.
    Raises UnsupportedError for another name.
    """

    def __init__(self, members: Members, device: torch.device, setting: str = AUTO) -> None:
        if setting != AUTO and setting not in DISPATCHERS:
            known = ", ".join((AUTO, *DISPATCHERS))
            raise UnsupportedError(f"no dispatcher is called {setting!r}; there are: {known}")
        self.members = members
        self._device = device
        self.is_open = setting == AUTO
        self._made = {name: make(members) for name, make in DISPATCHERS.items()}
        self._otherwise = "allgather" if self.is_open else setting
        self._table: dict[int, str] = {}

    @property
    def table(self) -> Mapping[int, str]:
        """The dispatcher of each measured bucket: of up to so many rows of a dp rank."""
        return dict(self._table)

    def name_for(self, most_rows: int) -> str:
        """Return the dispatcher of a step; beyond the last bucket it is the last one's."""
        if not self._table:
            return self._otherwise
        return self._table[min(bucket_of(most_rows), max(self._table))]

    def measure(
        self, trial: Trial, most_rows: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Choose for every bucket up to `most_rows`, unless the choice is set; all ranks call it.

        A tie goes to the first of DISPATCHERS.
        """
        if not self.is_open:
            return
        table = {}
        for bucket in _buckets(most_rows):
            watch = Stopwatch(self._greatest, clock)  # its own budget for each
            runs = [trial(each, bucket) for each in self._made.values()]
            for run in runs:
                run()
            seconds = watch.least_s(*runs)
            table[bucket] = min(zip(seconds, self._made, strict=True), key=lambda pair: pair[0])[1]
        self._table = table

    def __call__(
        self, x_TD: Tensor, router: Router, experts: PairExperts, most_rows: int
    ) -> Tensor:
        """See Dispatcher."""
        return self._made[self.name_for(most_rows)](x_TD, router, experts, most_rows)

    def _greatest(self, x: Tensor) -> Tensor:
        """See engine.ring.calibrate.Greatest."""
        group = self.members.group
        return group.all_gather(x.to(self._device)).view(group.size, len(x)).amax(0)


def _buckets(most_rows: int) -> list[int]:
    """Return the powers of two up to the one that `most_rows` need."""
    return [1 << power for power in range(bucket_of(most_rows).bit_length())]


def dispatch_for(
    config: ModelConfig,
    layout: Layout,
    tp: Collectives,
    experts: ExpertGroup | None,
    *,
    device: torch.device,
    setting: str = AUTO,
) -> Dispatch | None:
    """Return how tokens get to their experts; None without experts, or where tp alone splits them.

    Raises ValueError where the group `experts` is missing or not the layout's.
    """
    if config.moe is None:
        return None
    if experts is None:
        if layout.ep == layout.dp == 1:
            return None
        raise ValueError(f"{layout} needs a group of the {layout.expert_ranks} ranks with experts")
    if layout.sequence_parallel:
        raise ValueError(f"{layout} splits rows over tp itself: it takes no group for experts")
    if (experts.size, experts.rank) != (layout.expert_ranks, layout.expert_rank):
        raise ValueError(
            f"rank {layout.expert_rank} of {layout.expert_ranks} that share experts has a group "
            f"where it is {experts.rank} of {experts.size}"
        )
    return Dispatch(Members(layout=layout, group=experts, tp=tp), device, setting)
