"""What a sender offers receivers: lanes, and on the lanes of one host the way into its caches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtransfer.device_memory import Boxes
from kvtransfer.lane_choice import usable
from kvtransfer.settings import Lane
from kvtransfer.shared import SharedRegion, ShareHandle
from kvtransfer.wire import LaneKind


@dataclass(frozen=True, kw_only=True)
class Offer:
    """See kvtransfer.wire.Hello; without a mapped lane there are no offsets."""

    lanes: frozenset[LaneKind]
    region: SharedRegion | None
    offsets: tuple[tuple[int, int], ...] = ()
    lent: tuple[bytes, ...] = ()

    @property
    def share(self) -> ShareHandle | None:
        """The region's handle, where receivers need it."""
        return self.region.handle if self.region is not None and self.offsets else None


def make_offer(
    memories: Sequence[torch.Tensor],
    region: SharedRegion | None,
    boxes: Boxes | None,
    setting: Lane,
    *,
    rdma: bool,
) -> Offer:
    """Return the offer of these caches.

    Raises ValueError for one of the host's memory that is not of the region, OSError for one of a
    GPU's that cannot be lent.
    """
    on_device, shares = boxes is not None, region is not None
    lanes = frozenset(usable(setting, rdma=rdma, on_device=on_device, shares=shares))
    if region is None:
        return Offer(lanes=lanes, region=None)
    begins = [0 if on_device else region.offset_of(memory) for memory in memories]
    if lanes.isdisjoint((LaneKind.MAPPED, LaneKind.DEVICE)):
        return Offer(lanes=lanes, region=region)
    blocks = [memory.shape[2] for memory in memories]
    return Offer(
        lanes=lanes,
        region=region,
        offsets=tuple(zip(begins, blocks, strict=True)),
        lent=tuple(boxes.lend(memory) for memory in memories) if boxes is not None else (),
    )
