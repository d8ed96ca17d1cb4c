"""The seam of placement: who chooses instances for a request. `policies` has all that there are.

Pure, so that a simulator can run them too.
"""

from collections.abc import Sequence
from typing import Protocol

from router.views import CachedTokens, DecodeView, Need, Placement, PrefillView


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

        The instances come in order of their `load`, lowest first.
        What does not fit does not fit either with a longer prompt or more tokens to generate.
        `cached_tokens` may hash the prompt: it is not to be asked where nothing fits anyway.
        """
        ...
