"""Where most of the prompt is cached, however much there is to do; for comparison."""

from collections.abc import Sequence

from router.policies.fitting import fit
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
        fitting = fit(prefills, decodes, need, cached_tokens)
        if fitting is None:
            return None
        prefill = min(fitting.able, key=lambda p: (-fitting.cached.get(p.key, 0), p.load))
        decode = min(
            fitting.roomy,
            key=lambda d: (-cached_tokens(d.key, d.dp_rank), d.load),
            default=None,
        )
        return fitting.placement(prefill, decode)
