"""Which way payload travels between two ranks.

Pure. A sender offers the lanes that it can use, the receiver takes the best that works for both.
"""

from collections.abc import Iterable

from kvtransfer.errors import ConnectionRefused
from kvtransfer.settings import Lane
from kvtransfer.wire import LaneKind

_ONLY: dict[Lane, LaneKind] = {
    "mapped": LaneKind.MAPPED,
    "stream": LaneKind.STREAM,
    "ucx": LaneKind.TAGGED,
}


def usable(setting: Lane, *, rdma: bool, shares: bool = True) -> tuple[LaneKind, ...]:
    """Return the lanes that one side can use, the best first.

    UCX carries what goes over RDMA hardware. Without any it would run over the same TCP sockets
    and the same shared memory, and measured slower there than the lanes made for them.
    """
    if setting != "auto":
        wanted: Iterable[LaneKind] = (_ONLY[setting],)
    elif rdma:
        wanted = (LaneKind.MAPPED, LaneKind.TAGGED, LaneKind.STREAM)
    else:
        wanted = (LaneKind.MAPPED, LaneKind.STREAM)
    return tuple(lane for lane in wanted if shares or lane is not LaneKind.MAPPED)


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
