"""Owns the choice of instances for one request; pure, so that a simulator can run it too."""

from collections.abc import Sequence
from typing import Protocol

from router.ledger import CachedTokens, DecodeView, Need, Placement, PrefillView


class RoutingPolicy(Protocol):
    """Picks where a request goes among the instances that may be given work."""

    def choose(
        self,
        prefills: Sequence[PrefillView],
        decodes: Sequence[DecodeView],
        need: Need,
        cached_tokens: CachedTokens,
    ) -> Placement | None:
        """Returns a placement that fits now, or None where there is none.

        `cached_tokens` may hash the prompt: it is not to be asked where nothing fits anyway.
        """
        ...


class LeastLoaded:
    """Prefill that is done with this prompt first, by tokens; decode with the most free blocks.

    What a prefill instance has of the prompt in its cache is worth just the tokens that it saves:
    one with a queue longer than that loses against one that is idle.

    Free blocks stand for load to come as well as for load now: each request holds from the start
    what it will grow into. Among equals, the decode instance with fewer sequences steps faster.
    """

    def choose(
        self,
        prefills: Sequence[PrefillView],
        decodes: Sequence[DecodeView],
        need: Need,
        cached_tokens: CachedTokens,
    ) -> Placement | None:
        able = [p for p in prefills if p.fits(need)]
        roomy = [d for d in decodes if d.fits(need)] if need.decodes else []
        if not able or (need.decodes and not roomy):
            return None
        cached = {p.key: cached_tokens(p.key) for p in able}
        prefill = min(
            able,
            # The prompt's own length is the same everywhere.
            key=lambda p: (p.outstanding_tokens - cached[p.key], p.outstanding_requests, p.key),
        )
        decode = min(roomy, key=lambda d: (-d.free_blocks, d.sequences, d.key), default=None)
        return Placement(
            prefill=prefill.key,
            decode=decode.key if decode is not None else None,
            cached_tokens=cached[prefill.key],
        )
