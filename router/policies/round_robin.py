"""Each instance in turn, whatever it has to do; for comparison."""

from collections.abc import Sequence
from typing import TypeVar

from router.policies.fitting import fit
from router.views import CachedTokens, DecodeView, Need, Placement, PrefillView

_View = TypeVar("_View", DecodeView, PrefillView)


class RoundRobin:
    """The next of those that a request fits at, by name.

    A choice may be asked for again before it is booked. It is then the same: the instance's view
    is made anew when something is booked there.
    """

    def __init__(self) -> None:
        self._prefill: PrefillView | None = None
        self._decode: DecodeView | None = None

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
        self._prefill = prefill = _next(fitting.able, self._prefill)
        if need.decodes:
            self._decode = _next(fitting.roomy, self._decode)
        decode = self._decode if need.decodes else None
        return fitting.placement(prefill, decode)


def _next(views: Sequence[_View], last: _View | None) -> _View:
    if last is None:
        return min(views, key=_place)
    if any(view is last for view in views):
        return last
    later = [view for view in views if _place(view) > _place(last)]
    return min(later or views, key=_place)


def _place(view: DecodeView | PrefillView) -> tuple[str, int, int]:
    return (*view.key, view.dp_rank)
