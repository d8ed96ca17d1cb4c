"""Owns the question whether a request fits this moment, and the memory of those that did not."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import TypeVar

from router import colocated
from router.ledger import DecodeView, InstanceKey, Ledger, Need, Placement, PrefillView
from router.local_prefill import LocalPrefill
from router.policy import RoutingPolicy
from router.queue import Waiting
from router.views import Size

# What is left of a limit that has gone by.
_LEAST_SLACK_S = 0.001

_View = TypeVar("_View", DecodeView, PrefillView)


class Misfits:
    """What has not fitted since room last came back, and so needs not be tried again till then."""

    def __init__(self) -> None:
        self._tried: set[Waiting] = set()
        # What has not fitted anywhere, without what needs as much of each as another, which does
        # not fit either.
        self._least: list[Size] = []

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting in self._tried or self.has(waiting.need.size)

    def has(self, size: Size) -> bool:
        """Whether what needs so much of each, or more, does not fit."""
        return any(_is_as_large(size, least) for least in self._least)

    def add(self, waiting: Waiting, *, is_telling: bool = True) -> None:
        """`is_telling`: what needs as much does not fit either."""
        self._tried.add(waiting)
        if waiting.avoid or not is_telling:
            return  # it may not have been tried everywhere
        size = waiting.need.size
        self._least = [least for least in self._least if not _is_as_large(least, size)]
        self._least.append(size)


class Room:
    """The room of one moment, as the queue asks about it."""

    def __init__(
        self,
        ledger: Ledger,
        policy: RoutingPolicy,
        misfits: Misfits,
        now: float = 0.0,
        local: LocalPrefill | None = None,
    ) -> None:
        self._now = now
        self._ledger = ledger
        self._misfits = misfits
        self._policy = policy
        self._local = local or LocalPrefill(0)
        self._prefills = ledger.prefills()
        self._decodes = ledger.decodes()

    def place(self, waiting: Waiting) -> Placement | None:
        if waiting in self._misfits:
            return None
        prefills = _preferred(self._prefills, waiting.avoid)
        decodes = _preferred(self._decodes, waiting.avoid)
        need, cached_tokens = self._need_now(waiting), waiting.cached_tokens
        if need.colocated:
            placement = colocated.choose(self._policy, decodes, need, cached_tokens)
        else:
            placement = self._local.choose(
                self._policy.choose(prefills, decodes, need, cached_tokens),
                prefills,
                decodes,
                need,
                cached_tokens,
            )
        if placement is None:
            # Where only prefill is missing, decode may have more of another prompt, and fit it.
            is_telling = not self._local.is_on or not any(view.fits(need) for view in decodes)
            self._misfits.add(waiting, is_telling=is_telling)
        return placement

    def _need_now(self, waiting: Waiting) -> Need:
        """Its wait so far is a part of the time to its first token."""
        need, waited_s = self._ledger.asked(waiting.need), self._now - waiting.came_at
        if need.ttft_s == inf or not waiting.is_queued:
            return need
        return replace(need, ttft_s=max(_LEAST_SLACK_S, need.ttft_s - waited_s))

    def fits_ever(self, need: Need) -> bool:
        return self._ledger.fits_ever(need)

    def is_too_small_for(self, size: Size) -> bool:
        return self._misfits.has(size)


def _is_as_large(size: Size, least: Size) -> bool:
    return size[0] >= least[0] and size[1] >= least[1] and size[2] >= least[2]


def _preferred(views: Sequence[_View], avoid: frozenset[InstanceKey]) -> Sequence[_View]:
    return [v for v in views if v.key not in avoid] or views if avoid else views
