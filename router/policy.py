"""Owns the choice of instances for one request; pure, so that a simulator can run it too."""

from collections.abc import Sequence
from typing import Protocol

from router.ledger import DecodeView, Need, Placement, PrefillView


class RoutingPolicy(Protocol):
    """Picks where a request goes among the instances that may be given work."""

    def choose(
        self, prefills: Sequence[PrefillView], decodes: Sequence[DecodeView], need: Need
    ) -> Placement | None:
        """Returns a placement that fits now, or None where there is none."""
        ...


class LeastLoaded:
    """Prefill with the fewest outstanding tokens; decode with the most free blocks.

    Free blocks stand for load to come as well as for load now: each request holds from the start
    what it will grow into. Among equals, the decode instance with fewer sequences steps faster.
    """

    def choose(
        self, prefills: Sequence[PrefillView], decodes: Sequence[DecodeView], need: Need
    ) -> Placement | None:
        able = [p for p in prefills if p.fits(need)]
        if not able:
            return None
        prefill = min(able, key=lambda p: (p.outstanding_tokens, p.outstanding_requests, p.key))
        if not need.decodes:
            return Placement(prefill=prefill.key, decode=None)
        roomy = [d for d in decodes if d.fits(need)]
        if not roomy:
            return None
        decode = min(roomy, key=lambda d: (-d.free_blocks, d.sequences, d.key))
        return Placement(prefill=prefill.key, decode=decode.key)
