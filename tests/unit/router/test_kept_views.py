"""Views that are kept, and made anew where their account has changed."""

from router.kept_views import KeptViews


class Accounts(dict[str, list[int]]):
    """Amounts by key, and how often each was looked at."""

    def __init__(self, **amounts: list[int]) -> None:
        super().__init__(amounts)
        self.made: list[str] = []
        self.views = KeptViews(self.make)

    def make(self, key: str) -> list[int]:
        self.made.append(key)
        return list(self[key])


def test_only_what_has_changed_is_made_anew() -> None:
    accounts = Accounts(a=[1], b=[2, 3], c=[4])
    assert accounts.views.of(accounts) == [1, 2, 3, 4]
    accounts.made.clear()
    accounts["b"] = [5, 6]
    accounts.views.changed("b")
    assert accounts.views.of(accounts) == [1, 5, 6, 4]
    assert accounts.views.of(accounts) == [1, 5, 6, 4]
    assert accounts.made == ["b"]


def test_after_a_change_of_accounts_all_are_made_anew() -> None:
    accounts = Accounts(a=[1], b=[2], c=[3])
    assert accounts.views.of(accounts) == [1, 2, 3]
    accounts["c"] = [7]
    accounts.views.changed("c")
    accounts.views.changed("b")
    del accounts["b"]
    accounts["d"] = [4]
    accounts.views.forget()
    assert accounts.views.of(accounts) == [1, 7, 4]


def test_a_list_that_was_given_out_is_the_callers() -> None:
    accounts = Accounts(a=[1])
    accounts.views.of(accounts).append(9)
    before = accounts.views.of(accounts)
    accounts["a"] = [2]
    accounts.views.changed("a")
    assert accounts.views.of(accounts) == [2]
    assert before == [1]


def test_views_of_a_change_that_was_not_told_are_not_true() -> None:
    accounts = Accounts(a=[1], b=[2])
    assert accounts.views.are_true(accounts)
    accounts["a"] = [3]
    assert not accounts.views.are_true(accounts)
    accounts.views.changed("a")
    assert accounts.views.are_true(accounts)


def test_sums_follow_every_change() -> None:
    accounts = Accounts(a=[1], b=[2, 3], c=[])
    views = KeptViews(accounts.make, lambda view: (view, 1), sums=2)
    assert views.totals(accounts) == (6, 3)
    accounts["b"] = [7, 3]
    views.changed("b")
    views.changed("c")
    assert views.totals(accounts) == (11, 3)
    assert views.are_true(accounts)
    accounts.clear()
    views.forget()
    assert views.totals(accounts) == (0, 0)
