"""Text out of tokens: characters, stop strings, the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.answer import Answer
from router.request import AnswerPart, Finish, Stop, Tokens
from tests.unit.router.served import END, TOKENIZER


def answer(*strings: str, minimum: int = 0, prompt: str = "say ") -> Answer:
    stop = Stop(
        max_new_tokens=1000,
        min_new_tokens=minimum,
        strings=strings,
        token_ids=(),
        ignore_eos=False,
    )
    return Answer(TOKENIZER, tuple(TOKENIZER.encode(prompt)), stop)


def tokens(text: str, finish: Finish | None = None) -> Tokens:
    return Tokens(token_ids=tuple(TOKENIZER.encode(text)), finish=finish)


def pushed(made: Answer, *steps: Tokens) -> list[AnswerPart]:
    parts: list[AnswerPart] = []
    for step in steps:
        parts.append(made.push(step))
        if parts[-1].finish is not None:
            break
    return parts


def test_character_over_several_tokens_comes_whole() -> None:
    made = answer()
    smile = TOKENIZER.encode("🙂")
    texts = [made.push(Tokens(token_ids=(i,))).text for i in smile]
    assert texts == ["", "", "", "🙂"]


def test_character_cut_short_is_replaced_at_the_end() -> None:
    first = TOKENIZER.encode("🙂")[0]
    assert answer().push(Tokens(token_ids=(first,), finish=Finish.LENGTH)).text == "\ufffd"


def test_token_that_ends_the_answer_is_no_part_of_its_text() -> None:
    parts = pushed(answer(), tokens("hi"), tokens("!", Finish.STOP))
    assert "".join(p.text for p in parts) == "hi"
    assert parts[-1].finish is Finish.STOP
    assert parts[-1].completion_tokens == 3
    assert answer().push(Tokens(token_ids=(END,), finish=Finish.STOP)).text == ""


def test_last_token_counts_where_the_length_ends_the_answer() -> None:
    assert answer().push(tokens("hi!", Finish.LENGTH)).text == "hi!"


def test_stop_string_in_the_last_step_wins_over_its_reason() -> None:
    part = answer("b").push(tokens("abc", Finish.LENGTH))
    assert (part.text, part.finish, part.completion_tokens) == ("a", Finish.STOP, 3)


def test_stop_string_may_end_in_a_character_that_is_flushed() -> None:
    first = TOKENIZER.encode("🙂")[0]
    part = answer("\ufffd").push(Tokens(token_ids=(first,), finish=Finish.LENGTH))
    assert (part.text, part.finish) == ("", Finish.STOP)


def test_tokens_of_a_part_are_all_given_even_beyond_a_stop() -> None:
    part = answer("lo").push(tokens("hello you"))
    assert part.text == "hel"
    assert part.token_ids == tokens("hello you").token_ids


@pytest.mark.parametrize(("minimum", "text"), [(0, ""), (2, "a"), (3, "ab"), (6, "ababaX")])
def test_stop_strings_count_from_min_new_tokens_on(minimum: int, text: str) -> None:
    parts = pushed(answer("a", "b", minimum=minimum), tokens("ababaX", Finish.LENGTH))
    assert "".join(p.text for p in parts) == text


@given(
    text=st.text(alphabet="abc🙂", max_size=30),
    stops=st.lists(st.text(alphabet="abc🙂", min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=1),
)
def test_text_does_not_depend_on_how_steps_cut_it(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    ids = TOKENIZER.encode(text) if text else []
    whole = answer(*stops).push(Tokens(token_ids=tuple(ids), finish=Finish.LENGTH))
    steps, begin = [], 0
    for cut in cuts:
        steps.append(Tokens(token_ids=tuple(ids[begin : begin + cut])))
        begin += cut
    steps.append(Tokens(token_ids=tuple(ids[begin:]), finish=Finish.LENGTH))
    parts = pushed(answer(*stops), *steps)
    assert "".join(p.text for p in parts) == whole.text
    assert parts[-1].finish == whole.finish
