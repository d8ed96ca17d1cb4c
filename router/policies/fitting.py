"""What every policy asks first: which instances may be given a request, and where it may begin."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

from router.views import CachedTokens, DecodeView, InstanceKey, Need, Placement, PrefillView


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Those of each role that a request fits at now; `roomy` are none where decode has no part."""

    need: Need
    able: Sequence[PrefillView]
    roomy: Sequence[DecodeView]
    cached_tokens: CachedTokens

    @cached_property
    def _holders(self) -> AbstractSet[InstanceKey] | None:
        return self.cached_tokens.holders()

    def known_at_prefill(self) -> dict[InstanceKey, int]:
        """Returns how many of the prompt's tokens are cached, where any are."""
        able, held = self.able, self._holders
        if held is not None:
            able = [view for view in able if view.key in held] if held else []
        return {view.key: tokens for view in able if (tokens := self.cached_tokens(view.key))}

    def known_at_decode(self) -> list[tuple[int, int]]:
        """Returns (place in `roomy`, tokens of the prompt cached there), where any are."""
        held = self._holders
        if held is not None and not held:
            return []
        return [
            (place, tokens)
            for place, view in enumerate(self.roomy)
            if (held is None or view.key in held)
            and (tokens := self.cached_tokens(view.key, view.dp_rank))
        ]

    def placement(
        self,
        prefill: PrefillView,
        decode: DecodeView | None,
        *,
        cached_tokens: int,
        first: int = 0,
    ) -> Placement:
        """Returns what is chosen; `first` is the cp rank where the prompt is to begin, if short."""
        return Placement(
            prefill=prefill.key,
            decode=decode.key if decode is not None else None,
            cached_tokens=cached_tokens,
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
    prompt_tokens, total_tokens = need.prompt_tokens, need.total_tokens
    able = [p for p in prefills if prompt_tokens <= p.longest_prompt]
    if not able:
        return None
    # By what costs least to ask, where that is enough: there may be hundreds of instances.
    roomy = [
        d
        for d in (decodes if need.decodes else ())
        if total_tokens <= d.surely_fits or (total_tokens <= d.longest_sequence and d.fits(need))
    ]
    if need.decodes and not roomy:
        return None
    return Fitting(need=need, able=able, roomy=roomy, cached_tokens=cached_tokens)


def beginnings(prefill: PrefillView, need: Need) -> range:
    """Returns the cp ranks that load may have a prompt begin at."""
    return range(prefill.capacity.cp if is_short(prefill, need) else 1)


def is_short(prefill: PrefillView, need: Need) -> bool:
    """Whether the prompt fills no block, of which something could be cached."""
    return need.prompt_tokens <= prefill.capacity.block_size
