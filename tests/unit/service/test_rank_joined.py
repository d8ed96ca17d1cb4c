"""A transfer of several ranks ends once, when none of them has a part in it any more."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import Closed, Completed, Failed, TransferStats
from kvtransfer.errors import PeerLost
from service.ranks.joined import End, Joined, JoinedEnds

ID = 7


def completed(size: int = 10, transport: str = "mapped") -> Completed:
    return Completed(ID, TransferStats(size, 2, 0.5, transport, hidden_bytes=size // 2))


def failed(message: str = "gone") -> Failed:
    return Failed(ID, PeerLost(message), retryable=True)


def joined(ranks: int) -> JoinedEnds:
    ends = JoinedEnds(ranks)
    ends.begin(ID)
    return ends


def test_transfer_is_complete_with_its_last_rank_and_counts_all_of_them() -> None:
    ends = joined(3)
    assert ends.take(2, completed(10)) == Joined()
    # A rank that has nothing of a short prompt is complete without a connection.
    assert ends.take(0, Completed(ID, TransferStats(0, 0, 0.0, ""))) == Joined()
    whole = ends.take(1, completed(30, "tcp")).end
    assert isinstance(whole, Completed)
    assert whole.stats == TransferStats(40, 4, 0.5, "mapped, tcp", hidden_bytes=20)


def test_first_failure_makes_the_others_give_up_and_is_told_when_all_have() -> None:
    ends = joined(3)
    assert ends.take(0, completed()) == Joined()
    assert ends.take(1, failed("first")) == Joined(give_up=True)
    whole = ends.take(2, failed("second")).end
    assert isinstance(whole, Failed)
    assert str(whole.error) == "first"
    assert whole.retryable


def test_one_rank_that_was_closed_makes_it_closed() -> None:
    ends = joined(2)
    ends.take(0, completed())
    assert ends.take(1, Closed(ID)).end == Closed(ID)


def test_what_comes_twice_or_belongs_to_no_open_transfer_changes_nothing() -> None:
    ends = joined(2)
    ends.take(0, completed())
    assert ends.take(0, Closed(ID)) == Joined()
    assert isinstance(ends.take(1, completed()).end, Completed)
    assert ends.take(1, Closed(ID)) == Joined()
    assert ends.take(0, Closed(ID + 1)) == Joined()


@given(
    st.lists(st.sampled_from(["completed", "failed", "closed"]), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_whatever_order_there_is_one_end_and_it_comes_last(
    kinds: list[str], random: Random
) -> None:
    of_kind: dict[str, End] = {"completed": completed(), "failed": failed(), "closed": Closed(ID)}
    told = [(rank, of_kind[kind]) for rank, kind in enumerate(kinds)] * 2
    random.shuffle(told)
    ends = joined(len(kinds))
    seen: set[int] = set()
    found: list[End] = []
    for rank, end in told:
        seen.add(rank)
        result = ends.take(rank, end)
        if result.end is not None:
            assert len(seen) == len(kinds)
            found.append(result.end)
    [end] = found
    expected = "failed" if "failed" in kinds else "closed" if "closed" in kinds else "completed"
    assert type(end).__name__.lower() == expected


def test_what_is_kept_is_what_all_ranks_have() -> None:
    ends = JoinedEnds(3)
    ends.begin(5)
    ends.take(0, Failed(5, PeerLost("gone"), retryable=True, kept=((9, 4, 9),)))
    ends.take(1, Completed(5, TransferStats(1, 1, 0.1, "tcp")))
    joined = ends.take(2, Closed(5, ((2, 9, 9),)))
    assert isinstance(joined.end, Failed)
    assert joined.end.kept == ((2, 4, 9),)


def test_nothing_is_kept_where_a_rank_has_nothing() -> None:
    ends = JoinedEnds(2)
    ends.begin(5)
    ends.take(0, Closed(5, ((9, 9),)))
    assert ends.take(1, Closed(5)).end == Closed(5)
