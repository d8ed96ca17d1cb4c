"""A model's text files: which are taken, and what is said of those that cannot be."""

from pathlib import Path

import pytest

from tests.unit.text.made import byte_level, chat_assets
from text import AssetError, TextAssets, Tokenizer, load_assets

TOKENIZER = b"{}"


def test_folder_gives_only_the_text_files(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(name.encode())
    assert load_assets(tmp_path).files == {
        "tokenizer.json": b"tokenizer.json",
        "generation_config.json": b"generation_config.json",
    }


def test_missing_tokenizer_is_named_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"tokenizer\.json: is missing.*AutoTokenizer") as caught:
        load_assets(tmp_path)
    assert caught.value.file == str(tmp_path / "tokenizer.json")
    with pytest.raises(AssetError, match=r"tokenizer\.json: is missing"):
        TextAssets({"tokenizer_config.json": b"{}"})


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER)
    (tmp_path / "tokenizer_config.json").mkdir()
    with pytest.raises(AssetError, match=r"tokenizer_config\.json: cannot be read"):
        load_assets(tmp_path)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AssetError, match="is not a text asset"):
        TextAssets({"tokenizer.json": TOKENIZER, "../../etc/passwd": b""})


def test_files_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("text.assets.MAX_ASSET_BYTES", 3)
    with pytest.raises(AssetError, match="has 4 bytes"):
        TextAssets({"tokenizer.json": b"1234"})


def test_digest_depends_on_names_and_contents_not_on_order() -> None:
    one = TextAssets({"tokenizer.json": b"ab", "chat_template.jinja": b"c"})
    other_order = TextAssets({"chat_template.jinja": b"c", "tokenizer.json": b"ab"})
    moved = TextAssets({"tokenizer.json": b"a", "chat_template.jinja": b"bc"})
    renamed = TextAssets({"tokenizer.json": b"ab", "tokenizer_config.json": b"c"})
    assert one.digest == other_order.digest
    assert len({one.digest, moved.digest, renamed.digest}) == 3


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_configuration_that_is_no_json_object_is_named(content: bytes) -> None:
    files = {**chat_assets().files, "tokenizer_config.json": content}
    with pytest.raises(AssetError, match=r"^tokenizer_config\.json"):
        Tokenizer(TextAssets(files))


def test_tokenizer_that_is_none_is_named() -> None:
    with pytest.raises(AssetError, match=r"^tokenizer\.json: is not a tokenizer"):
        Tokenizer(TextAssets({"tokenizer.json": TOKENIZER}))


@pytest.mark.parametrize("value", ['"2"', "[-1]", "[true]", "{}"])
def test_end_ids_that_are_none_are_named(value: str) -> None:
    generation = f'{{"eos_token_id": {value}}}'.encode()
    files = {"tokenizer.json": byte_level().to_str().encode(), "generation_config.json": generation}
    with pytest.raises(AssetError, match=r"^generation_config\.json: eos_token_id is"):
        Tokenizer(TextAssets(files))
