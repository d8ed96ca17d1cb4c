import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.errors import StartError
from service.security.rights import Right
from service.security.tokens import TokenFile, WorkerToken, hash_of, new_token

TOKEN = new_token()


def entry(**changes: Any) -> dict[str, Any]:
    made = {"name": "a", "tenant": "acme", "rights": ["inference"], "sha256": hash_of(TOKEN)}
    return made | changes


def written(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"tokens": list(entries)}))
    return path


def test_new_tokens_differ_and_hold_256_bits() -> None:
    assert new_token() != new_token()
    assert len(new_token().removeprefix("twp_")) * 6 >= 256


@pytest.mark.parametrize("dump", [json.dumps, yaml.safe_dump])
def test_token_is_found_by_its_hash_in_json_and_in_yaml(tmp_path: Path, dump: Any) -> None:
    path = tmp_path / "tokens"
    given = entry(max_priority=-1, max_new_tokens=5, max_concurrent_requests=2)
    path.write_text(dump({"tokens": [given]}))
    file = TokenFile(path)
    caller = file.find(TOKEN)
    assert caller is not None
    assert (caller.name, caller.tenant, caller.rights) == (
        "a",
        "acme",
        frozenset({Right.INFERENCE}),
    )
    assert (caller.max_priority, caller.max_new_tokens) == (-1, 5)
    assert caller.max_concurrent_requests == 2
    assert file.find(new_token()) is None
    assert file.find(hash_of(TOKEN)) is None


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([entry(sha256=TOKEN)], r"tokens\.0\.sha256"),
        ([entry(rights=["everything"])], r"tokens\.0\.rights"),
        ([entry(rights=[])], r"tokens\.0\.rights"),
        ([entry(secret=TOKEN)], r"tokens\.0\.secret"),
        ([entry(max_concurrent_requests=0)], r"max_concurrent_requests"),
        ([entry(), entry(name="b")], "the same"),
        ([entry(), entry(sha256="0" * 64)], "the same"),
    ],
)
def test_wrong_entries_are_told_by_their_place_and_never_quoted(
    tmp_path: Path, entries: list[dict[str, Any]], complaint: str
) -> None:
    with pytest.raises(StartError, match=complaint) as caught:
        TokenFile(written(tmp_path / "tokens", *entries))
    assert TOKEN not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("text", ["tokens: [", "- a", "", "tokens: 5", "\x00"])
def test_file_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(StartError, match="--tokens-file"):
        TokenFile(path)


def test_first_worker_token_is_shown_and_all_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "worker"
    old, new = new_token(), new_token()
    path.write_text(f"{new}\n{old}\n")
    worker = WorkerToken(path)
    assert worker.shown() == new
    assert worker.accepts(new)
    assert worker.accepts(old)
    assert not worker.accepts(new_token())
    assert not worker.accepts("")


@pytest.mark.parametrize("text", ["", "\n", "short", "a" * 2000, "ünicode-and-long-enough"])
def test_worker_file_without_a_good_token_is_refused_and_not_quoted(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "worker"
    path.write_text(text)
    with pytest.raises(StartError, match="--worker-token-file") as caught:
        WorkerToken(path)
    assert not text.strip() or text.strip() not in str(caught.value)
