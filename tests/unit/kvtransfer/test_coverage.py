"""Bookkeeping of what is ready and what has arrived."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.coverage import Coverage, Ready, kept_by_all, kept_tokens
from kvtransfer.layout import KVShape, Span, uniform
from kvtransfer.outgoing import Lane
from kvtransfer.plan import Region

REGION = Region(0, 0, Span(1, 4), Span(0, 2), Span(16, 61))
LAYOUT = uniform(KVShape(layers=5, kv_heads=2, head_size=8, dtype="float32"), 4)


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=20))
@settings(max_examples=200)
def test_ready_hands_out_whole_units_once(marks: list[tuple[int, int]]) -> None:
    ready = Ready(Span(16, 61), 4)
    final: set[int] = set()
    sent: list[int] = []
    for a, b in marks:
        span = Span(min(a, b), max(a, b))
        final |= set(span)
        sent += [t for part in ready.add(span) for t in part]
        assert len(sent) == len(set(sent))
        assert set(sent) <= final
        whole = {
            t
            for t in range(16, 61)
            if all(u in final for u in range(t // 4 * 4, min(t // 4 * 4 + 4, 61)))
        }
        assert set(sent) == whole


def test_coverage_takes_each_box_once_and_only_what_is_planned() -> None:
    coverage = Coverage([REGION], 4)
    assert coverage.missing_units == 3 * 12
    assert coverage.take(Span(1, 3), Span(0, 2), Span(16, 32)) is None
    for layers, heads, tokens in (
        (Span(2, 4), Span(0, 2), Span(28, 40)),
        (Span(0, 2), Span(0, 2), Span(32, 40)),
        (Span(1, 2), Span(0, 1), Span(32, 40)),
        (Span(1, 2), Span(0, 2), Span(33, 40)),
        (Span(1, 2), Span(0, 2), Span(32, 39)),
        (Span(1, 2), Span(0, 2), Span(56, 64)),
    ):
        assert coverage.refusal(layers, heads, tokens) is not None
        assert coverage.take(layers, heads, tokens) is not None
    assert coverage.missing_units == 3 * 12 - 2 * 4
    assert coverage.take(Span(3, 4), Span(0, 2), Span(16, 61)) is None
    assert coverage.take(Span(1, 3), Span(0, 2), Span(32, 61)) is None
    assert coverage.missing_units == 0


def test_asking_whether_a_box_may_come_does_not_take_it() -> None:
    coverage = Coverage([REGION], 4)
    box = (Span(1, 3), Span(0, 2), Span(16, 32))
    assert coverage.refusal(*box) is None
    assert coverage.missing_units == 3 * 12
    assert coverage.take(*box) is None
    assert coverage.refusal(*box) is not None


def test_what_is_kept_ends_at_the_first_gap_of_any_source() -> None:
    one, other = Coverage([REGION], 4), Coverage([replace(REGION, layers=Span(1, 2))], 4)
    assert kept_tokens(LAYOUT, Span(16, 61), 61, [one, other]) == (61, 16, 16, 16, 61)
    one.take(Span(1, 3), Span(0, 2), Span(16, 32))
    one.take(Span(1, 2), Span(0, 2), Span(40, 61))
    assert kept_tokens(LAYOUT, Span(16, 61), 61, [one, other]) == (61, 16, 32, 16, 61)
    other.take(Span(1, 2), Span(0, 2), Span(16, 61))
    assert kept_tokens(LAYOUT, Span(16, 61), 61, [one, other]) == (61, 32, 32, 16, 61)
    one.take(Span(1, 2), Span(0, 2), Span(32, 40))
    assert kept_tokens(LAYOUT, Span(16, 61), 61, [one, other]) == (61, 61, 32, 16, 61)
    assert kept_tokens(LAYOUT, Span(0, 16), 61, []) == (16,) * 5


def test_what_is_kept_ends_at_the_first_gap_of_any_heads() -> None:
    heads = [replace(REGION, heads=Span(0, 1)), replace(REGION, heads=Span(1, 2))]
    for first, second in ((0, 1), (1, 0)):
        coverage = Coverage(heads, 4)
        coverage.take(Span(1, 4), Span(first, first + 1), Span(16, 24))
        coverage.take(Span(1, 4), Span(second, second + 1), Span(16, 32))
        assert kept_tokens(LAYOUT, Span(16, 61), 61, [coverage]) == (61, 24, 24, 24, 61)


def test_an_instance_keeps_what_all_of_its_ranks_hold() -> None:
    assert kept_by_all([(61, 16, 32), (16, 61, 32)]) == (16, 16, 32)
    assert kept_by_all([(61, 16)]) == (61, 16)
    assert kept_by_all([]) == ()


def test_ready_layers_of_the_same_tokens_share_a_message() -> None:
    lane = Lane.of(0, [(0, 4, REGION)])
    lane.add_ready(0, Span(0, 9), Span(0, 60))
    box = lane.next_due(100).box
    assert (box.layers, box.tokens) == (Span(1, 4), Span(16, 60))
    assert lane.missing_units == 3


def test_a_large_layer_is_cut_and_a_lone_one_is_not_held_back() -> None:
    lane = Lane.of(0, [(0, 4, REGION)])
    lane.add_ready(0, Span(1, 2), Span(16, 60))
    taken = [lane.next_due(5).box.tokens for _ in range(3)]
    assert taken == [Span(16, 36), Span(36, 56), Span(56, 60)]
    assert not lane.queue
    assert lane.missing_units == 25
