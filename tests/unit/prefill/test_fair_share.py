"""Who was given the least, and where a tenant that comes or comes back starts."""

from prefill.fair_share import FairShare


def served(share: FairShare, *tenants: str, tokens: int = 10) -> None:
    for tenant in tenants:
        share.charge(tenant, tokens)
    share.settle()


def test_newcomer_starts_where_the_least_served_tenant_of_the_latest_step_did() -> None:
    share = FairShare()
    share.join("a")
    share.join("b")
    served(share, "a", tokens=30)
    served(share, "b", tokens=20)
    served(share, "a", "b")
    share.join("c")
    assert share.level("c") == 20


def test_newcomer_does_not_share_the_credit_of_one_that_stands_still() -> None:
    share = FairShare()
    share.join("does not fit")
    share.join("a")
    for _ in range(10):
        served(share, "a")
    share.join("b")
    assert (share.level("does not fit"), share.level("b")) == (0, 90)


def test_one_that_stood_still_does_not_take_newcomers_down_again() -> None:
    share = FairShare()
    share.join("slow")
    share.join("a")
    for _ in range(10):
        served(share, "a")
    served(share, "slow")
    share.join("b")
    assert share.level("b") == 90


def test_tenant_gets_no_credit_for_idling() -> None:
    share = FairShare()
    share.join("a")
    share.join("b")
    share.leave("b")
    for _ in range(10):
        served(share, "a")
    share.join("b")
    assert share.level("b") == 90


def test_leaving_and_coming_back_forgives_nothing() -> None:
    share = FairShare()
    share.join("a")
    share.join("b")
    served(share, "a", tokens=100)
    served(share, "b", tokens=1)
    share.leave("a")
    share.join("a")
    assert share.level("a") == 100


def test_tenant_stays_where_it_is_while_one_of_its_prompts_is_left() -> None:
    share = FairShare()
    share.join("a")
    share.join("b")
    share.join("b")
    for _ in range(10):
        served(share, "a")
    share.leave("b")
    share.join("b")
    assert share.level("b") == 0


def test_it_is_true_while_any_tenant_has_a_prompt() -> None:
    share = FairShare()
    assert not share
    share.join("a")
    assert share
    share.leave("a")
    assert not share


def test_what_is_remembered_of_idle_tenants_is_bounded() -> None:
    share = FairShare()
    for number in range(1500):
        share.join(f"{number}")
    for number in range(1500):
        served(share, f"{number}", tokens=10)
        share.leave(f"{number}")
    assert len(share._debts) == 1024
    share.join("1499")
    assert share.level("1499") == 10


def test_debt_below_where_newcomers_start_is_not_kept() -> None:
    share = FairShare()
    share.join("a")
    share.join("b")
    served(share, "b")
    share.leave("b")
    assert share._debts == {"b": 10}
    served(share, "a", tokens=20)
    served(share, "a")
    assert share._debts == {}
