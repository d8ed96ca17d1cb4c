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
    """Prefill that is done with this prompt first, by tokens; decode with the most room.

    What a prefill instance has of the prompt in its cache is worth just the tokens that it saves:
    one with a queue longer than that loses against one that is idle. With context parallelism a
    short prompt begins at the rank that is done with it first. Where a longer one begins follows
    from its beginning, so that the next one finds what is cached of it; it needs all ranks anyway.

    Room is free tokens: they stand for load to come as well as for load now, since each request
    holds from the start what it will grow into. A token of the prompt that a decode instance has
    already counts as one more. It spares one write over the network, a token that others hold costs
    one read from memory in each step to come; a link is slower than memory by about as much as
    answers have steps. So a conversation goes on where it was, and since it needs more room there
    than its known beginning is worth, a busy instance does not get all that begin alike. Among
    equals, the decode instance with fewer sequences steps faster.
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
        *_, first, prefill = min(
            (
                p.tokens_until(need.prompt_tokens, cached[p.key], first),
                p.outstanding_requests,
                p.key,
                first,
                p,
            )
            for p in able
            for first in _beginnings(p, need)
        )
        decode = min(
            roomy,
            key=lambda d: (
                -d.room(cached_tokens(d.key, d.dp_rank)),
                d.sequences,
                d.key,
                d.dp_rank,
            ),
            default=None,
        )
        return Placement(
            prefill=prefill.key,
            decode=decode.key if decode is not None else None,
            cached_tokens=cached[prefill.key],
            cp_first=first if _is_short(prefill, need) else None,
            dp_rank=decode.dp_rank if decode is not None else 0,
        )


def _beginnings(prefill: PrefillView, need: Need) -> range:
    return range(prefill.capacity.cp if _is_short(prefill, need) else 1)


def _is_short(prefill: PrefillView, need: Need) -> bool:
    """Whether the prompt fills no block, of which something could be cached."""
    return need.prompt_tokens <= prefill.capacity.block_size
