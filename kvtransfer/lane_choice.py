"""Which way payload travels between two ranks.

Pure. A sender offers the lanes that it can use, the receiver takes the best that works for both.
"""

from collections.abc import Iterable

from kvtransfer.errors import ConnectionRefused
from kvtransfer.settings import Lane
from kvtransfer.wire import LaneKind

_ONLY: dict[Lane, LaneKind] = {
    "stream": LaneKind.STREAM,
    "ucx": LaneKind.TAGGED,
}


def usable(
    setting: Lane, *, rdma: bool, on_device: bool, shares: bool = True
) -> tuple[LaneKind, ...]:
    """Return the lanes that one side can use, the best first.

    What is mapped is memory of the sort that both have, the host's or a GPU's. UCX carries what
    goes over RDMA hardware. Without any it would run over the same TCP sockets and the same shared
    memory, and measured slower there than the lanes made for them.
    """
    mapped = LaneKind.DEVICE if on_device else LaneKind.MAPPED
    if setting == "mapped":
        wanted: Iterable[LaneKind] = (mapped,)
    elif setting != "auto":
        wanted = (_ONLY[setting],)
    elif rdma:
        wanted = (mapped, LaneKind.TAGGED, LaneKind.STREAM)
    else:
        wanted = (mapped, LaneKind.STREAM)
    return tuple(lane for lane in wanted if shares or lane is not mapped)


def in_common(usable_here: Iterable[LaneKind], offered: frozenset[LaneKind]) -> list[LaneKind]:
    """Return the lanes to try, the best first; raises ConnectionRefused where there is none."""
    common = [lane for lane in usable_here if lane in offered]
    if not common:
        here = "/".join(lane.name.lower() for lane in usable_here) or "none"
        there = "/".join(lane.name.lower() for lane in sorted(offered)) or "none"
        raise ConnectionRefused(
            f"no lane for KV in common: {here} here, {there} there; "
            "set the same lane on both pools, or auto"
        )
    return common
