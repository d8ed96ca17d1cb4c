"""Owns the choice of instances for one request; pure, so that a simulator can run it too."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Protocol

from router.ledger import CachedTokens, DecodeView, InstanceKey, Need, Placement, PrefillView

_LOAD = attrgetter("load")


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

        What does not fit does not fit either with a longer prompt or more tokens to generate.
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
        prompt_tokens, total_tokens = need.prompt_tokens, need.total_tokens
        able = [p for p in prefills if prompt_tokens <= p.longest_prompt]
        # By what costs least to ask, where that is enough: there may be hundreds of instances.
        roomy = [
            d
            for d in decodes
            if total_tokens <= d.surely_fits
            or (total_tokens <= d.longest_sequence and d.fits(need))
        ]
        if not able or (need.decodes and not roomy):
            return None
        cached = {p.key: tokens for p in able if (tokens := cached_tokens(p.key))}
        *_, first, prefill = min(
            (
                p.tokens_until(prompt_tokens, cached.get(p.key, 0), first),
                p.outstanding_requests,
                p.key,
                first,
                p,
            )
            for p in _first_prefills(able, cached)
            for first in _beginnings(p, need)
        )
        decode = _roomiest(roomy, cached_tokens) if need.decodes else None
        return Placement(
            prefill=prefill.key,
            decode=decode.key if decode is not None else None,
            cached_tokens=cached.get(prefill.key, 0),
            cp_first=first if _is_short(prefill, need) else None,
            dp_rank=decode.dp_rank if decode is not None else 0,
        )


def _first_prefills(
    able: Sequence[PrefillView], cached: Mapping[InstanceKey, int]
) -> Sequence[PrefillView]:
    """Returns those that can be done with a prompt first: any that has some of it, and the one
    that owes least. With context parallelism it depends on the ranks, so that any of them can.
    """
    idlest = min(able, key=_LOAD)
    if idlest.capacity.cp > 1:
        return able
    return [idlest, *(p for p in able if p.key in cached or p.capacity.cp > 1)]


def _roomiest(roomy: Sequence[DecodeView], cached_tokens: CachedTokens) -> DecodeView:
    """Returns the one with the most room, what is cached of the prompt counted as such."""
    best = min(roomy, key=_LOAD)
    least = best.load
    for view in roomy:
        tokens = cached_tokens(view.key, view.dp_rank)
        if tokens:
            load = (-view.room(tokens), *view.load[1:])
            if load < least:
                best, least = view, load
    return best


def _beginnings(prefill: PrefillView, need: Need) -> range:
    return range(prefill.capacity.cp if _is_short(prefill, need) else 1)


def _is_short(prefill: PrefillView, need: Need) -> bool:
    """Whether the prompt fills no block, of which something could be cached."""
    return need.prompt_tokens <= prefill.capacity.block_size
