"""The least loaded of each role: prefill by the tokens that it owes, decode by its room."""

from collections.abc import Iterable, Sequence

from router.policies.fitting import Fitting, beginnings, fit
from router.views import CachedTokens, DecodeView, Need, Placement, PrefillView


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
        fitting = fit(prefills, decodes, need, cached_tokens)
        if fitting is None:
            return None
        prefill, first = first_done(fitting)
        return fitting.placement(prefill, roomiest(fitting), first=first)


def first_done(fitting: Fitting) -> tuple[PrefillView, int]:
    """Returns the one that computes the fewest tokens until it is done with a prompt.

    And the cp rank that the prompt is to begin at.
    """
    need, cached = fitting.need, fitting.cached
    *_, first, prefill = min(
        (
            p.tokens_until(need.prompt_tokens, cached.get(p.key, 0), first),
            p.outstanding_requests,
            p.key,
            first,
            p,
        )
        for p in _first_prefills(fitting)
        for first in beginnings(p, need)
    )
    return prefill, first


def _first_prefills(fitting: Fitting) -> Iterable[PrefillView]:
    """Returns those that can be done with a prompt first: any that has some of it, and the one
    that owes least. With context parallelism it depends on the ranks, so that any of them can.
    """
    idlest, prompt_tokens = fitting.idlest, fitting.need.prompt_tokens
    if idlest.capacity.cp > 1:
        return fitting.able
    rings = [p for p in fitting.prefills if p.capacity.cp > 1]
    return [idlest, *fitting.knowing, *(p for p in rings if prompt_tokens <= p.longest_prompt)]


def roomiest(fitting: Fitting) -> DecodeView | None:
    """Returns the one with the most room, what is cached of the prompt counted as such."""
    best = fitting.roomiest
    if best is None:
        return None
    least = best.load
    for view, tokens in fitting.known_at_decode():
        load = (-view.room(tokens), *view.load[1:])
        if load < least:
            best, least = view, load
    return best
