"""Where most of the prompt is cached, however much there is to do; for comparison."""

from collections.abc import Sequence

from router.policies.fitting import fit, is_short
from router.views import CachedTokens, DecodeView, Need, Placement, PrefillView


class PrefixOnly:
    """Both instances with the longest known beginning, and of equals the least loaded."""

    def choose(
        self,
        prefills: Sequence[PrefillView],
        decodes: Sequence[DecodeView],
        need: Need,
        cached_tokens: CachedTokens,
    ) -> Placement | None:
        fitting = fit(prefills, decodes, need)
        if fitting is None:
            return None
        able, roomy = fitting
        prefill = min(able, key=lambda p: (-cached_tokens(p.key), p.load))
        decode = min(roomy, key=lambda d: (-cached_tokens(d.key, d.dp_rank), d.load), default=None)
        return Placement(
            prefill=prefill.key,
            decode=decode.key if decode is not None else None,
            cached_tokens=cached_tokens(prefill.key),
            cp_first=0 if is_short(prefill, need) else None,
            dp_rank=decode.dp_rank if decode is not None else 0,
        )
