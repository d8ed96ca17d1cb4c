"""Owns what of a list of views is still true: those of accounts that have not changed are kept."""

from collections.abc import Callable, Collection, Iterable
from typing import Generic, TypeVar

_Key = TypeVar("_Key")
_View = TypeVar("_View")


class KeptViews(Generic[_Key, _View]):
    """The views of all accounts, one or more of each, made anew only where one has changed.

    `make` gives an account's views by its key. There are hundreds of accounts, of which a decision
    changes two.
    """

    def __init__(self, make: Callable[[_Key], list[_View]]) -> None:
        self._make = make
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
        if self._views is None:
            self._views = self._all(keys)
        else:
            for key in self._changed:
                self._views[self._places[key]] = self._make(key)
        self._changed.clear()
        return self._views.copy()

    def are_true(self, keys: Collection[_Key]) -> bool:
        """Whether what is kept is what would be made anew."""
        return self.of(keys) == [view for key in keys for view in self._make(key)]

    def _all(self, keys: Iterable[_Key]) -> list[_View]:
        views: list[_View] = []
        self._places.clear()
        for key in keys:
            begin = len(views)
            views += self._make(key)
            self._places[key] = slice(begin, len(views))
        return views
