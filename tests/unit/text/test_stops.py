"""Stop strings: what is given out, what is held, and when an answer ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text import StopStrings, TextError

letters = st.text("ab", max_size=30)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """Search plainly: the shortest beginning that ends with a stop, without the longest such."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher, out = StopStrings(stops), ""
    for piece in pieces:
        emit, stopped = matcher.push(piece)
        out += emit
        if stopped:
            return out, True
    return out + matcher.flush(), False


@settings(max_examples=400)
@given(pieces=st.lists(letters, max_size=8), stops=stop_lists)
def test_result_is_the_plain_searchs_however_the_text_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    assert run(pieces, stops) == expected("".join(pieces), stops)


@settings(max_examples=400)
@given(text=letters, stops=stop_lists)
def test_only_the_longest_possible_start_of_a_stop_is_held(text: str, stops: list[str]) -> None:
    if expected(text, stops)[1]:
        return
    emit, _ = StopStrings(stops).push(text)
    starts = [stop[:n] for stop in stops for n in range(len(stop))]
    assert text[len(emit) :] == max(
        (start for start in starts if text.endswith(start)), key=len, default=""
    )


def test_match_across_pieces_drops_everything_from_it_on() -> None:
    stops = StopStrings(["\n\nUser:"])
    assert stops.push("Fine.\n") == ("Fine.", False)
    assert stops.push("\nUs") == ("", False)
    assert stops.push("er: next") == ("", True)
    assert stops.push("more") == ("", True)
    assert stops.flush() == ""


def test_false_start_is_given_out_as_soon_as_it_is_one() -> None:
    stops = StopStrings(["</end>"])
    assert stops.push("a</en") == ("a", False)
    assert stops.push("try") == ("</entry", False)


def test_overlapping_false_start_keeps_the_part_that_may_still_match() -> None:
    stops = StopStrings(["aab"])
    assert stops.push("aaa") == ("a", False)
    assert stops.push("b") == ("", True)


def test_without_stops_text_passes_at_once() -> None:
    stops = StopStrings([])
    assert stops.push("anything") == ("anything", False)
    assert stops.flush() == ""


def test_empty_stop_is_refused() -> None:
    with pytest.raises(TextError, match="empty"):
        StopStrings(["a", ""])
