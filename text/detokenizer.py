"""Turns a growing list of token ids into text, piece by piece, with nothing to take back.

Owns the part of one sequence's output that is not yet certain. Text is certain once no
later token can change it: a character may span tokens, and with byte fallback one bad byte
spoils the whole run of byte tokens it stands in. All that is given out, put together, equals
the tokenizer's decoding of all ids at once.
"""

import codecs
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

from text.tokenizer import Tokenizer

# More of a prompt than this never changes how its continuation reads.
_TAIL_TOKENS = 16
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class _Decoding(Protocol):
    def push(self, token_id: int, piece: str) -> str: ...

    def flush(self) -> str: ...


class Detokenizer:
    """The text of one sequence's output.

    `prompt_tail` is the prompt's last ids, or all of them: the output goes on from there, so
    its first word keeps the space before it that the tokenizer drops at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        tail = list(self._pieces(prompt_tail[-_TAIL_TOKENS:]))
        self._decoding: _Decoding
        if tokenizer.decoder_kinds == ("ByteLevel",):
            self._decoding = _ByteLevel(tail)
        else:
            self._decoding = _Window(tokenizer, tail)

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids and return the text that has become certain, never half a character."""
        return "".join([self._decoding.push(*token) for token in self._pieces(ids)])

    def flush(self) -> str:
        """Return the rest at the end of the output; a character cut short is U+FFFD."""
        return self._decoding.flush()

    def _pieces(self, ids: Iterable[int]) -> Iterable[tuple[int, str]]:
        for token_id in ids:
            piece = self._tokenizer.piece(token_id)
            if piece is not None:
                yield token_id, piece


class _ByteLevel:
    """A token spells bytes, and the text is their UTF-8, whatever the borders of tokens."""

    def __init__(self, tail: Sequence[tuple[int, str]]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for _, piece in tail:  # the output may complete the prompt's last character
            self._decoder.decode(_spelled_bytes(piece))

    def push(self, token_id: int, piece: str) -> str:
        return self._decoder.decode(_spelled_bytes(piece))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """Any decoder that needs to know no more of the past than that there was some.

    Decodes what is new together with the last token before it, so that the decoder does not
    take the new for the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer, tail: Sequence[tuple[int, str]]) -> None:
        self._tokenizer = tokenizer
        self._byte_fallback = "ByteFallback" in tokenizer.decoder_kinds
        self._context = [t for t, piece in tail if not self._in_byte_run(piece)][-1:]
        self._pending: list[int] = []

    def push(self, token_id: int, piece: str) -> str:
        self._pending.append(token_id)
        if self._in_byte_run(piece):
            return ""
        text = self.flush()
        self._context = [token_id]
        return text

    def flush(self) -> str:
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode([*self._context, *self._pending])[len(before) :]
        self._pending = []
        return text

    def _in_byte_run(self, piece: str) -> bool:
        return self._byte_fallback and _BYTE_TOKEN.fullmatch(piece) is not None


def _byte_alphabet() -> dict[str, int]:
    """Return the 256 characters that byte-level BPE writes bytes with (Radford et al. 2019, GPT-2).

    A byte that prints in Latin-1 stands for itself, the others for 256, 257, ... in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    codes = {byte: byte for byte in printable} | {b: 256 + n for n, b in enumerate(others)}
    return {chr(code): byte for byte, code in codes.items()}


_BYTES = _byte_alphabet()


# Enough for what most texts are made of; a piece takes about 150 bytes.
@lru_cache(maxsize=1 << 15)
def _spelled_bytes(piece: str) -> bytes:
    """Return the bytes that a byte-level token spells; an added token may be plain text."""
    try:
        return bytes([_BYTES[character] for character in piece])
    except KeyError:
        return piece.encode()
