"""Owns what of a list of views is still true: those of accounts that have not changed are kept."""

from collections.abc import Callable, Collection, Iterable
from typing import Generic, TypeVar

_Key = TypeVar("_Key")
_View = TypeVar("_View")


class KeptViews(Generic[_Key, _View]):
    """The views of all accounts, one or more of each, made anew only where one has changed.

    `make` gives an account's views by its key, and `amounts` what of a view is summed up, so many
    numbers. There are hundreds of accounts, of which a decision changes two.
    """

    def __init__(
        self,
        make: Callable[[_Key], list[_View]],
        amounts: Callable[[_View], tuple[int, ...]] = lambda _: (),
        sums: int = 0,
    ) -> None:
        self._make = make
        self._amounts = amounts
        self._totals = [0] * sums
        self._views: list[_View] | None = None
        self._places: dict[_Key, slice] = {}
        self._changed: set[_Key] = set()

    def changed(self, key: _Key) -> None:
        """An account has other amounts than before, and as many views."""
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
        views = [view for key in keys for view in self._make(key)]
        sums = zip(*map(self._amounts, views), strict=True)
        return self.of(keys) == views and (not views or [*map(sum, sums)] == self._totals)

    def _current(self, keys: Iterable[_Key]) -> list[_View]:
        if self._views is None:
            self._views = self._all(keys)
        else:
            for key in self._changed:
                self._put(self._views, self._places[key], self._make(key))
        self._changed.clear()
        return self._views

    def _all(self, keys: Iterable[_Key]) -> list[_View]:
        views: list[_View] = []
        self._places.clear()
        self._totals = [0] * len(self._totals)
        for key in keys:
            place = slice(len(views), len(views))
            made = self._make(key)
            self._put(views, place, made)
            self._places[key] = slice(place.start, place.start + len(made))
        return views

    def _put(self, views: list[_View], place: slice, made: list[_View]) -> None:
        for sign, some in ((-1, views[place]), (1, made)):
            for view in some:
                for number, amount in enumerate(self._amounts(view)):
                    self._totals[number] += sign * amount
        views[place] = made
