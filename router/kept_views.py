"""Owns what of a list of views is still true: those of accounts that have not changed are kept."""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable
from operator import itemgetter
from typing import Any, Generic, TypeVar

_Key = TypeVar("_Key")
_View = TypeVar("_View")


class KeptViews(Generic[_Key, _View]):
    """The views of all accounts in order, one or more of each, made anew where one has changed.

    `make` gives an account's views by its key, and `order` what sorts a view, by which no two are
    equal. `amounts` gives what of a view is summed up, so many numbers. There are hundreds of
    accounts, of which a decision changes two.
    """

    def __init__(
        self,
        make: Callable[[_Key], list[_View]],
        order: Callable[[_View], Any],
        amounts: Callable[[_View], tuple[int, ...]] = lambda _: (),
        sums: int = 0,
    ) -> None:
        self._make = make
        self._order = order
        self._amounts = amounts
        self._totals = [0] * sums
        self._views: list[_View] | None = None
        # By which each of them was sorted, and each account's.
        self._places: list[Any] = []
        self._views_of: dict[_Key, list[tuple[Any, _View]]] = {}
        self._changed: set[_Key] = set()

    def changed(self, key: _Key) -> None:
        """An account has other amounts than before."""
        self._changed.add(key)

    def forget(self) -> None:
        """There are other accounts than before, or other ones that may be given work."""
        self._views = None

    def of(self, keys: Iterable[_Key]) -> list[_View]:
        """Returns the views of all accounts; the list is the caller's."""
        return self._current(keys).copy()

    def totals(self, keys: Iterable[_Key]) -> tuple[int, ...]:
        """Returns the sums of all views' amounts."""
        self._current(keys)
        return tuple(self._totals)

    def are_true(self, keys: Collection[_Key]) -> bool:
        """Whether what is kept is what would be made anew."""
        views = sorted((view for key in keys for view in self._make(key)), key=self._order)
        sums = zip(*map(self._amounts, views), strict=True)
        return self.of(keys) == views and (not views or [*map(sum, sums)] == self._totals)

    def _current(self, keys: Iterable[_Key]) -> list[_View]:
        if self._views is None:
            self._totals = [0] * len(self._totals)
            self._views_of = {key: self._made(key) for key in keys}
            placed = [each for views in self._views_of.values() for each in views]
            placed.sort(key=itemgetter(0))
            self._places = [place for place, _ in placed]
            self._views = [view for _, view in placed]
        else:
            for key in self._changed:
                self._put(self._views, key)
        self._changed.clear()
        return self._views

    def _put(self, views: list[_View], key: _Key) -> None:
        places = self._places
        for place, view in self._views_of[key]:
            at = bisect_left(places, place)
            del places[at], views[at]
            self._sum_up(view, -1)
        made = self._views_of[key] = self._made(key)
        for place, view in made:
            at = bisect_left(places, place)
            places.insert(at, place)
            views.insert(at, view)

    def _made(self, key: _Key) -> list[tuple[Any, _View]]:
        made = self._make(key)
        for view in made:
            self._sum_up(view, 1)
        return [(self._order(view), view) for view in made]

    def _sum_up(self, view: _View, sign: int) -> None:
        for number, amount in enumerate(self._amounts(view)):
            self._totals[number] += sign * amount
