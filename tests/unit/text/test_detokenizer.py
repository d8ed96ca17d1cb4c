"""Streamed text equals the text of all ids at once, for each family of tokenizers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.text.made import CORPUS, FAMILIES, assets
from text import Detokenizer, Tokenizer

TOKENIZERS = {name: Tokenizer(assets(build())) for name, build in FAMILIES.items()}
families = st.sampled_from(sorted(TOKENIZERS))


def stream(tokenizer: Tokenizer, ids: list[int], tail: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, tail or [])
    return [*(detokenizer.push([token_id]) for token_id in ids), detokenizer.flush()]


def ids_of(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Draw ids with special ones, unknown ones and, often, runs of byte tokens."""
    beyond = tokenizer.vocab_size + 3
    return data.draw(st.lists(st.integers(0, beyond) | st.integers(0, 260), max_size=40))


@settings(max_examples=400)
@given(family=families, data=st.data())
def test_any_ids_stream_to_their_full_decoding(family: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[family]
    ids = ids_of(data, tokenizer)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=200)
@given(family=families, text=st.text() | st.sampled_from(CORPUS))
def test_any_text_streams_to_its_full_decoding(family: str, text: str) -> None:
    tokenizer = TOKENIZERS[family]
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200)
@given(family=families, data=st.data())
def test_how_ids_are_grouped_does_not_change_the_text(family: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[family]
    ids = ids_of(data, tokenizer)
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = Detokenizer(tokenizer)
    grouped = detokenizer.push(ids[:cut]) + detokenizer.push(ids[cut:])
    assert grouped == "".join(stream(tokenizer, ids)[:-1])


@settings(max_examples=200)
@given(family=families, before=st.sampled_from(CORPUS[:2]), data=st.data())
def test_output_goes_on_from_the_prompt(family: str, before: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[family]
    prompt = tokenizer.encode(before)
    ids = ids_of(data, tokenizer)
    joined = tokenizer.decode([*prompt, *ids])
    assert tokenizer.decode(prompt) + "".join(stream(tokenizer, ids, prompt)) == joined


def test_space_of_the_first_word_is_kept_after_a_prompt_only() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    fox = tokenizer.encode("fox")[1:]
    assert "".join(stream(tokenizer, fox)) == "fox"
    assert "".join(stream(tokenizer, fox, tokenizer.encode("the"))) == " fox"


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
def test_character_cut_short_comes_at_the_end_as_the_full_decoding_has_it(family: str) -> None:
    tokenizer = TOKENIZERS[family]
    ids = tokenizer.encode("a€")
    pieces = stream(tokenizer, ids[:-1])
    assert "".join(pieces[:-1]) == "a"
    assert pieces[-1] == tokenizer.decode(ids[:-1])[1:]
    assert set(pieces[-1]) == {"\ufffd"}


def test_byte_level_character_comes_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("☃")
    assert len(ids) == 3
    assert stream(tokenizer, ids) == ["", "", "☃", ""]


def test_run_of_byte_tokens_is_certain_only_where_it_ends() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    snowman = tokenizer.encode("☃")[-3:]
    the = tokenizer.encode("the")[1:]
    bad = [tokenizer.encode("☃")[-1]]
    pieces = stream(tokenizer, [*snowman, *the])
    assert pieces[:3] == ["", "", ""]
    assert pieces[3].startswith("☃ ")
    assert "".join(stream(tokenizer, [*snowman, *bad, *the])) == "\ufffd" * 4 + " the"


def test_flush_leaves_nothing() -> None:
    for tokenizer in TOKENIZERS.values():
        detokenizer = Detokenizer(tokenizer)
        detokenizer.push(tokenizer.encode("the fox €")[:-1])
        detokenizer.flush()
        assert detokenizer.flush() == ""
