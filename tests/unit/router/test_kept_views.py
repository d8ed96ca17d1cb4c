"""Views that are kept, and made anew where their account has changed."""

from hypothesis import given
from hypothesis import strategies as st

from router.kept_views import KeptViews


def in_order(view: int) -> int:
    return view


class Accounts(dict[str, list[int]]):
    """Amounts by key, and how often each was looked at."""

    def __init__(self, **amounts: list[int]) -> None:
        super().__init__(amounts)
        self.made: list[str] = []
        self.views = KeptViews(self.make, in_order)

    def make(self, key: str) -> list[int]:
        self.made.append(key)
        return list(self[key])


def test_only_what_has_changed_is_made_anew() -> None:
    accounts = Accounts(a=[1], b=[2, 3], c=[4])
    assert accounts.views.of(accounts) == [1, 2, 3, 4]
    accounts.made.clear()
    accounts["b"] = [5, 6]
    accounts.views.changed("b")
    assert accounts.views.of(accounts) == [1, 4, 5, 6]
    assert accounts.views.of(accounts) == [1, 4, 5, 6]
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
    assert accounts.views.of(accounts) == [1, 4, 7]


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
    views = KeptViews(accounts.make, in_order, lambda view: (view, 1), sums=2)
    assert views.totals(accounts) == (6, 3)
    accounts["b"] = [7, 3]
    views.changed("b")
    views.changed("c")
    assert views.totals(accounts) == (11, 3)
    assert views.are_true(accounts)
    accounts.clear()
    views.forget()
    assert views.totals(accounts) == (0, 0)


@given(
    changes=st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 99), max_size=3)), max_size=12
    )
)
def test_views_are_in_order_after_every_change(changes: list[tuple[str, list[int]]]) -> None:
    accounts = {"a": [5], "b": [], "c": [40, 7]}
    views = KeptViews(
        lambda key: [(amount, key, number) for number, amount in enumerate(accounts[key])],
        lambda view: view,
    )
    for key, amounts in changes:
        accounts[key] = amounts
        views.changed(key)
        found = views.of(accounts)
        assert found == sorted(found)
        assert len(found) == sum(map(len, accounts.values()))
        assert views.are_true(accounts)
