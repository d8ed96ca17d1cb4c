"""Owns a model's text files: which there are, their contents as bytes, and their digest.

Knows nothing of what a tokenizer or a template does with them. Workers read them from the
model's folder; routers get the same bytes over the control path.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from text.errors import AssetError

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
ASSET_FILES = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, GENERATION_CONFIG)

# The largest tokenizer.json in use is about 35 MB.
MAX_ASSET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class TextAssets:
    """A model's text files by name; only tokenizer.json must be there.

    Raises AssetError for a name that is not one of `ASSET_FILES`, for a missing
    tokenizer.json and for a file above `MAX_ASSET_BYTES`.
    """

    files: Mapping[str, bytes]

    def __post_init__(self) -> None:
        for name, content in self.files.items():
            if name not in ASSET_FILES:
                raise AssetError(name, "is not a text asset", f"send only {', '.join(ASSET_FILES)}")
            if len(content) > MAX_ASSET_BYTES:
                raise AssetError(
                    name, f"has {len(content)} bytes", f"the limit is {MAX_ASSET_BYTES}"
                )
        if TOKENIZER not in self.files:
            raise AssetError(TOKENIZER, "is missing", "a model is served only with its tokenizer")

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over names and contents; equal files have equal digests."""
        sha = hashlib.sha256()
        for name in sorted(self.files):
            sha.update(f"{name} {len(self.files[name])}\n".encode())
            sha.update(self.files[name])
        return sha.hexdigest()

    def json_object(self, name: str) -> dict[str, Any]:
        """Return a file's JSON object, empty where the file is absent; raises AssetError."""
        try:
            value = json.loads(self.files.get(name, b"{}"))
        except ValueError as exc:
            raise AssetError(name, f"is not JSON ({exc})", "get the model's files again") from exc
        if not isinstance(value, dict):
            raise AssetError(
                name, f"holds a {type(value).__name__}", "it must hold one JSON object"
            )
        return value


def load_assets(folder: Path) -> TextAssets:
    """Read a model folder's text files; raises AssetError where one is missing or unreadable."""
    if not (folder / TOKENIZER).exists():
        raise AssetError(
            str(folder / TOKENIZER),
            "is missing",
            "where the model comes with a tokenizer of another kind, load it with transformers' "
            "AutoTokenizer and save_pretrained() it: that writes tokenizer.json",
        )
    files = {}
    for name in ASSET_FILES:
        path = folder / name
        try:
            files[name] = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise AssetError(
                str(path), f"cannot be read ({exc.strerror})", "check it and its permissions"
            ) from exc
    return TextAssets(files)
