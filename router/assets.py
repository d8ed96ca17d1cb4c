"""Owns the model's text files as they come from an instance, and the tokenizer made of them.

Keeps one tokenizer, that of the model served now. Takes only known file names, a bounded number
of bytes, and content that has the digest it was announced with.
"""

import asyncio

from service.errors import InvalidRequest
from text import ASSET_FILES, Detokenizer, TextAssets, TextError, Tokenizer

MAX_BYTES = 64 << 20


class AssetsReceiver:
    """Puts one instance's chunks together."""

    def __init__(self) -> None:
        self._files: dict[str, bytearray] = {}
        self._bytes = 0

    def add(self, file: str, data: bytes) -> None:
        """Takes the next chunk. Raises InvalidRequest for an unknown name and for too much."""
        if file not in ASSET_FILES:
            raise InvalidRequest("assets.file", repr(file[:64]), f"send {', '.join(ASSET_FILES)}")
        self._bytes += len(data)
        if self._bytes > MAX_BYTES:
            raise InvalidRequest(
                "assets", f"more than {MAX_BYTES} bytes", f"at most {MAX_BYTES} are taken"
            )
        self._files.setdefault(file, bytearray()).extend(data)

    def finish(self) -> dict[str, bytes]:
        """Returns the files, and forgets them."""
        files = {name: bytes(data) for name, data in self._files.items()}
        self._files = {}
        return files


class TokenizerStore:
    """The tokenizer of the model that is served now, by the digest of its files."""

    def __init__(self) -> None:
        self._digest = ""
        self._tokenizer: Tokenizer | None = None
        self._changed = asyncio.Event()

    def get(self, digest: str) -> Tokenizer | None:
        return self._tokenizer if digest == self._digest else None

    async def wait(self, digest: str) -> Tokenizer:
        """Returns the tokenizer once its files have come; the caller bounds the wait."""
        while (tokenizer := self.get(digest)) is None:
            await self._changed.wait()
        return tokenizer

    async def put(self, digest: str, files: dict[str, bytes]) -> None:
        """Makes the tokenizer, off the event loop. Raises InvalidRequest for unusable files."""
        tokenizer = await asyncio.to_thread(_make, digest, files)
        self._digest, self._tokenizer = digest, tokenizer
        self._changed.set()
        self._changed = asyncio.Event()


def _make(digest: str, files: dict[str, bytes]) -> Tokenizer:
    try:
        assets = TextAssets(files)
        if assets.digest != digest:
            raise InvalidRequest(
                "assets", f"digest {assets.digest}", f"hello announced digest {digest}"
            )
        tokenizer = Tokenizer(assets)
        Detokenizer(tokenizer)  # refuses tokenizers whose text cannot be streamed
        return tokenizer
    except TextError as exc:
        raise InvalidRequest("assets", str(exc), "correct the model folder") from exc
