"""Encoding and special ids, compared with what transformers makes of the same files."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from tests.unit.text.made import CHAT_CONFIG, assets, byte_fallback, byte_level, chat_assets
from text import (
    AssetError,
    MessagesRefused,
    NoChatTemplate,
    PromptError,
    TextAssets,
    Tokenizer,
    load_assets,
)

CHAT = Tokenizer(chat_assets())
LLAMA = Tokenizer(assets(byte_fallback(), config={"bos_token": "<s>", "eos_token": "</s>"}))


def save(folder: Path, files: TextAssets) -> Path:
    for name, content in files.files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = save(tmp_path_factory.mktemp("model"), chat_assets())
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(folder))
    return loaded


@settings(max_examples=60)
@given(text=st.text())
def test_text_encodes_as_transformers_encodes_it(
    reference: PreTrainedTokenizerFast, text: str
) -> None:
    assert CHAT.encode(text) == reference.encode(text)


@settings(max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")))
def test_byte_level_text_survives_the_round_trip(text: str) -> None:
    assert CHAT.decode(CHAT.encode(text)) == text


@settings(max_examples=60)
@given(
    messages=st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()),
        min_size=1,
        max_size=5,
    )
)
def test_messages_encode_as_transformers_encodes_them(
    reference: PreTrainedTokenizerFast, messages: list[tuple[str, str]]
) -> None:
    expected = reference.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert CHAT.encode_messages(messages) == expected


@settings(max_examples=60)
@given(ids=st.lists(st.integers(0, 500)))
def test_ids_decode_as_transformers_decodes_them(
    reference: PreTrainedTokenizerFast, ids: list[int]
) -> None:
    assert CHAT.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_special_tokens_in_text_become_their_ids() -> None:
    assert CHAT.encode("a<|im_end|>") == [*CHAT.encode("a"), 2]


def test_text_gets_the_post_processors_bos_and_messages_do_not() -> None:
    template = "{{ bos_token }}{{ messages[0].content }}"
    with_chat = Tokenizer(assets(byte_fallback(), config={"bos_token": "<s>"}, template=template))
    assert LLAMA.encode("the dog")[0] == 1
    assert with_chat.encode_messages([("user", "the dog")]) == LLAMA.encode("the dog")


def test_end_ids_are_the_generation_configs_then_the_tokenizers_own() -> None:
    one = assets(byte_level(), config=CHAT_CONFIG, generation={"eos_token_id": 0})
    none = assets(byte_level(), config={"eos_token": "unknown"}, generation={})
    assert CHAT.eos_token_ids == (2, 0)
    assert Tokenizer(one).eos_token_ids == (0, 2)
    assert LLAMA.eos_token_ids == (2,)
    assert Tokenizer(none).eos_token_ids == ()


def test_special_ids_are_those_of_both_files() -> None:
    tokenizer = Tokenizer(assets(byte_level(), config={"eos_token": "<think>"}))
    think = tokenizer.encode("<think>")
    assert CHAT.special_ids == {0, 1, 2}
    assert tokenizer.special_ids == {0, 1, 2, *think}
    assert tokenizer.decode(think) == ""
    assert CHAT.decode(think) == "<think>"


def test_vocabulary_counts_added_tokens() -> None:
    assert CHAT.vocab_size == 403


def test_a_files_truncation_and_padding_do_not_touch_prompts() -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    assert Tokenizer(assets(tokenizer)).encode("the quick dog") == CHAT.encode("the quick dog")


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(PromptError, match="not valid Unicode"):
        CHAT.encode("a\ud800")


def test_messages_without_a_template_are_refused() -> None:
    assert not LLAMA.has_chat_template
    assert CHAT.has_chat_template
    with pytest.raises(NoChatTemplate, match="send the prompt as text"):
        LLAMA.encode_messages([("user", "hello")])


def test_the_templates_own_refusal_reaches_the_caller() -> None:
    with pytest.raises(MessagesRefused, match="unknown role wizard"):
        CHAT.encode_messages([("wizard", "hello")])


def test_template_file_goes_before_the_configurations() -> None:
    files = assets(byte_level(), config=CHAT_CONFIG, template="{{ messages[0].content }}")
    assert Tokenizer(files).encode_messages([("user", "fox")]) == CHAT.encode("fox")


def test_of_named_templates_the_default_is_taken() -> None:
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "fox"}]
    files = assets(byte_level(), config={"chat_template": named})
    assert Tokenizer(files).encode_messages([]) == CHAT.encode("fox")
    with pytest.raises(AssetError, match="chat_template has tools but no default"):
        Tokenizer(assets(byte_level(), config={"chat_template": named[:1]}))
    with pytest.raises(AssetError, match="neither text nor a list"):
        Tokenizer(assets(byte_level(), config={"chat_template": {"a": 1}}))


def test_template_file_that_is_no_text_is_named() -> None:
    files = {**assets(byte_level()).files, "chat_template.jinja": b"\xff"}
    with pytest.raises(AssetError, match=r"chat_template\.jinja: is not UTF-8"):
        Tokenizer(TextAssets(files))


def test_decoder_that_cannot_be_streamed_is_refused_at_load() -> None:
    tokenizer = byte_level()
    tokenizer.decoder = decoders.CTC()
    with pytest.raises(AssetError, match=r"its decoder \(CTC\) cannot be streamed"):
        Tokenizer(assets(tokenizer))


def test_files_from_a_folder_serve_as_those_sent(tmp_path: Path) -> None:
    loaded = load_assets(save(tmp_path, chat_assets()))
    assert loaded.digest == chat_assets().digest
    assert Tokenizer(loaded).encode("fox") == CHAT.encode("fox")


def test_import_is_light() -> None:
    program = "import text, sys; print({'torch', 'transformers', 'numpy', 'grpc'} & {*sys.modules})"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
