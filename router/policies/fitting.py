"""What every policy asks first: which instances may be given a request, and where it may begin."""

from collections.abc import Sequence

from router.views import CachedTokens, DecodeView, InstanceKey, Need, PrefillView


def fit(
    prefills: Sequence[PrefillView], decodes: Sequence[DecodeView], need: Need
) -> tuple[list[PrefillView], list[DecodeView]] | None:
    """Returns those of each role that a request fits at now, None where it cannot be placed."""
    prompt_tokens, total_tokens = need.prompt_tokens, need.total_tokens
    able = [p for p in prefills if prompt_tokens <= p.longest_prompt]
    if not able:
        return None
    if not need.decodes:
        return able, []
    # By what costs least to ask, where that is enough: there may be hundreds of instances.
    roomy = [
        d
        for d in decodes
        if total_tokens <= d.surely_fits or (total_tokens <= d.longest_sequence and d.fits(need))
    ]
    return (able, roomy) if roomy else None


def known_at_prefill(
    able: Sequence[PrefillView], cached_tokens: CachedTokens
) -> dict[InstanceKey, int]:
    """Returns how many of the prompt's tokens are cached, where any are."""
    held = cached_tokens.holders()
    if held is not None:
        able = [view for view in able if view.key in held] if held else []
    return {view.key: tokens for view in able if (tokens := cached_tokens(view.key))}


def known_at_decode(
    roomy: Sequence[DecodeView], cached_tokens: CachedTokens
) -> list[tuple[int, int]]:
    """Returns (place in `roomy`, tokens of the prompt cached there), where any are."""
    held = cached_tokens.holders()
    if held is not None and not held:
        return []
    return [
        (place, tokens)
        for place, view in enumerate(roomy)
        if (held is None or view.key in held) and (tokens := cached_tokens(view.key, view.dp_rank))
    ]


def beginnings(prefill: PrefillView, need: Need) -> range:
    """Returns the cp ranks that load may have a prompt begin at."""
    return range(prefill.capacity.cp if is_short(prefill, need) else 1)


def is_short(prefill: PrefillView, need: Need) -> bool:
    """Whether the prompt fills no block, of which something could be cached."""
    return need.prompt_tokens <= prefill.capacity.block_size
