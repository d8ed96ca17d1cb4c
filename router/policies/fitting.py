"""What every policy asks first: which instances may be given a request, and where it may begin."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from router.views import CachedTokens, DecodeView, InstanceKey, Need, Placement, PrefillView

_View = TypeVar("_View", DecodeView, PrefillView)


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Those of each role that a request fits at now, the least loaded first.

    There may be hundreds of instances, which are gone through only by a policy that weighs them
    all: `idlest` and `roomiest` are the first of each role. `roomiest` is None, and `roomy` are
    none, where decode has no part.
    """

    need: Need
    idlest: PrefillView
    roomiest: DecodeView | None
    prefills: Sequence[PrefillView]
    decodes: Sequence[DecodeView]
    cached_tokens: CachedTokens

    @cached_property
    def able(self) -> list[PrefillView]:
        """The prefill instances."""
        prompt_tokens = self.need.prompt_tokens
        return [p for p in self.prefills if prompt_tokens <= p.longest_prompt]

    @cached_property
    def roomy(self) -> list[DecodeView]:
        """The dp ranks of decode instances."""
        return [*_roomy(self.decodes, self.need)] if self.need.decodes else []

    @cached_property
    def knowing(self) -> list[PrefillView]:
        """Those of the prefill instances that have some of the prompt in their cache."""
        prompt_tokens = self.need.prompt_tokens
        return [view for view, _ in self._at_prefill if prompt_tokens <= view.longest_prompt]

    @cached_property
    def cached(self) -> dict[InstanceKey, int]:
        """How many tokens of the prompt prefill instances have in their cache, where any."""
        return {view.key: tokens for view, tokens in self._at_prefill}

    @cached_property
    def _at_prefill(self) -> Collection[tuple[PrefillView, int]]:
        return self._known(self.prefills)

    def known_at_decode(self) -> list[tuple[DecodeView, int]]:
        """Returns those that have some of the prompt in their cache, and how many tokens of it."""
        known = self._known(self.decodes) if self.need.decodes else ()
        return [(view, tokens) for view, tokens in known if view.fits(self.need)]

    def _known(self, views: Sequence[_View]) -> Collection[tuple[_View, int]]:
        held = self._held
        if held is None:
            asked = ((view, self.cached_tokens(view.key, view.dp_rank)) for view in views)
            return [(view, tokens) for view, tokens in asked if tokens]
        if not held:
            return ()
        return [
            (view, tokens)
            for view in views
            if (of_ranks := held.get(view.key)) and (tokens := of_ranks[view.dp_rank])
        ]

    @cached_property
    def _held(self) -> Mapping[InstanceKey, Sequence[int]] | None:
        return self.cached_tokens.everywhere()

    def placement(
        self, prefill: PrefillView, decode: DecodeView | None, *, first: int = 0
    ) -> Placement:
        """Returns what is chosen; `first` is the cp rank where the prompt is to begin, if short."""
        return Placement(
            prefill=prefill.key,
            decode=decode.key if decode is not None else None,
            cached_tokens=self.cached.get(prefill.key, 0),
            cp_first=first if is_short(prefill, self.need) else None,
            dp_rank=decode.dp_rank if decode is not None else 0,
        )


def fit(
    prefills: Sequence[PrefillView],
    decodes: Sequence[DecodeView],
    need: Need,
    cached_tokens: CachedTokens,
) -> Fitting | None:
    """Returns where a request fits now, None where it cannot be placed."""
    prompt_tokens = need.prompt_tokens
    idlest = next((p for p in prefills if prompt_tokens <= p.longest_prompt), None)
    roomiest = next(iter(_roomy(decodes, need)), None) if need.decodes else None
    if idlest is None or (need.decodes and roomiest is None):
        return None
    return Fitting(
        need=need,
        idlest=idlest,
        roomiest=roomiest,
        prefills=prefills,
        decodes=decodes,
        cached_tokens=cached_tokens,
    )


def _roomy(decodes: Sequence[DecodeView], need: Need) -> Iterable[DecodeView]:
    total_tokens = need.total_tokens
    # By what costs least to ask, where that is enough.
    return (
        d
        for d in decodes
        if total_tokens <= d.surely_fits or (total_tokens <= d.longest_sequence and d.fits(need))
    )


def beginnings(prefill: PrefillView, need: Need) -> range:
    """Returns the cp ranks that load may have a prompt begin at."""
    return range(prefill.capacity.cp if is_short(prefill, need) else 1)


def is_short(prefill: PrefillView, need: Need) -> bool:
    """Whether the prompt fills no block, of which something could be cached."""
    return need.prompt_tokens <= prefill.capacity.block_size
