"""Which layouts can be deterministic, and what their ranks must then do in order.

The forms of compute that are it are engine.kernels'; this knows none of them.
"""

from engine.dispatch import DISPATCHERS
from engine.errors import UnsupportedError
from engine.layers.layer import Placement
from engine.ordered import OrderedCollectives, OrderedExperts
from engine.parallel import Collectives, ExpertGroup, Layout


def in_order(
    layout: Layout, ranks: Collectives | None, experts: ExpertGroup | None
) -> tuple[Collectives | None, ExpertGroup | None]:
    """Return what ranks do together, with sums in the order of the ranks."""
    if layout.tp > 2 and ranks is not None:
        ranks = OrderedCollectives(ranks, layout)
    if experts is not None and experts.size > 2:
        experts = OrderedExperts(experts)
    return ranks, experts


def check_deterministic(placement: Placement) -> None:
    """Raise UnsupportedError where a token's bits would depend on more than its sequence."""
    layout, dispatch = placement.layout, placement.dispatch
    if layout.cp > 1:
        raise UnsupportedError(
            f"deterministic: cp={layout.cp} merges attention in an order that depends on how the "
            "pass is dealt to the ranks; use cp=1"
        )
    if dispatch is not None and dispatch.is_open:
        raise UnsupportedError(
            "deterministic: dispatch=auto chooses by timing, which differs from start to start; "
            "name one of " + ", ".join(DISPATCHERS)
        )
    moves = bool(placement.expert_maps) or placement.redundant_experts > 0
    if dispatch is not None and moves and dispatch.name_for(1) == "allgather":
        raise UnsupportedError(
            "deterministic: dispatch=allgather adds up by where experts are, which maps may change "
            "and replicas make depend on a token's row; use alltoall or padded"
        )
