"""Turns text and messages into token ids and token ids into text, with a model's own files.

Owns the tokenizer, the chat template it goes with, and which ids are special or end an
answer. Knows nothing of requests; text that is still growing is `Detokenizer`'s.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from text.assets import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, TextAssets
from text.errors import AssetError, NoChatTemplate, PromptError
from text.template import ChatTemplate

# The special tokens that tokenizer_config.json may name, and that templates may use.
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# What `Detokenizer` can stream: byte-level alone, or decoders that look at no more than a
# token, its neighbours in a run of byte tokens, and whether it is the first.
_BYTE_LEVEL = ("ByteLevel",)
_LOCAL = {"BPEDecoder", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}


class Tokenizer:
    """A model's tokenizer and chat template; thread-safe.

    `eos_token_ids` end an answer; `special_ids` have no text; `decoder_kinds` are the types of
    the decoder's parts, in order. Raises AssetError for files that cannot be used.
    """

    def __init__(self, assets: TextAssets) -> None:
        self._config = assets.json_object(TOKENIZER_CONFIG)
        self._generation = assets.json_object(GENERATION_CONFIG)
        self._backend = _backend(assets.files[TOKENIZER])
        self._named = _named_tokens(self._config)
        self.decoder_kinds = _decoder_kinds(self._backend)
        _mark_special(self._backend, list(self._named.values()))
        self._template = _chat_template(assets, self._config, self._named)
        self.eos_token_ids = self._eos_token_ids()
        self.special_ids = frozenset(
            token_id
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_messages` can be used."""
        return self._template is not None

    @cached_property
    def vocab_size(self) -> int:
        """How many ids the tokenizer knows; the model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a plain text prompt, with what the model puts around a text (BOS).

        Special tokens written out in the text become their ids. Raises PromptError for text
        that is not valid Unicode.
        """
        return self._encode(text, add_special_tokens=True)

    def encode_messages(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the ids of (role, content) messages, up to where the answer begins.

        Raises NoChatTemplate, MessagesRefused, TemplateFailed or PromptTooLong.
        """
        if self._template is None:
            raise NoChatTemplate(
                "this model has no chat template; send the prompt as text or as token ids"
            )
        return self._encode(self._template.render(messages), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens and ids outside the vocabulary have none."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def piece(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it; None where it has no text."""
        return None if token_id in self.special_ids else self._backend.id_to_token(token_id)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as exc:
            raise PromptError("the prompt is not valid Unicode text") from exc

    def _eos_token_ids(self) -> tuple[int, ...]:
        """Return generation_config.json's ids and the tokenizer's own, in that order."""
        value = self._generation.get("eos_token_id")
        ids = [] if value is None else list(value) if isinstance(value, list) else [value]
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            raise AssetError(
                GENERATION_CONFIG,
                f"eos_token_id is {value!r}",
                "it must be a token id or a list of them",
            )
        own = self._backend.token_to_id(self._named.get("eos_token", ""))
        return tuple(dict.fromkeys([*ids, own] if own is not None else ids))


def _backend(content: bytes) -> Backend:
    try:
        backend = Backend.from_buffer(content)
    except ValueError as exc:
        raise AssetError(
            TOKENIZER,
            f"is not a tokenizer that this version of tokenizers reads ({exc})",
            "get the model's files again, or update the package tokenizers",
        ) from exc
    # Settings of the file's last user: they would silently cut or fill prompts.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _decoder_kinds(backend: Backend) -> tuple[str, ...]:
    """Return the types of the decoder's parts, in order; empty where tokens are just joined."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    kinds = tuple(_flat_kinds(decoder)) if decoder else ()
    if kinds != _BYTE_LEVEL and not _LOCAL.issuperset(kinds):
        raise AssetError(
            TOKENIZER,
            f"its decoder ({', '.join(kinds)}) cannot be streamed",
            "serve a model with a byte-level, metaspace or WordPiece tokenizer",
        )
    return kinds


def _flat_kinds(decoder: dict[str, Any]) -> list[str]:
    if decoder["type"] == "Sequence":
        return [kind for part in decoder["decoders"] for kind in _flat_kinds(part)]
    return [decoder["type"]]


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens by name; a token is written as a string or as an object."""
    named = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            named[name] = content
    return named


def _mark_special(backend: Backend, contents: list[str]) -> None:
    """Make tokens special that only tokenizer_config.json calls so, as Hugging Face does."""
    added = backend.get_added_tokens_decoder()
    for content in contents:
        token_id = backend.token_to_id(content)
        if token_id is None or (token_id in added and added[token_id].special):
            continue
        backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _chat_template(
    assets: TextAssets, config: dict[str, Any], variables: dict[str, str]
) -> ChatTemplate | None:
    """Return the model's template: chat_template.jinja, else tokenizer_config.json's own."""
    if CHAT_TEMPLATE in assets.files:
        try:
            source = assets.files[CHAT_TEMPLATE].decode()
        except UnicodeDecodeError as exc:
            raise AssetError(CHAT_TEMPLATE, "is not UTF-8 text", "save it as UTF-8") from exc
        return ChatTemplate(source, file=CHAT_TEMPLATE, variables=variables)
    named = _configured_template(config.get("chat_template"))
    if named is None:
        return None
    return ChatTemplate(named, file=TOKENIZER_CONFIG, variables=variables)


def _configured_template(value: Any) -> str | None:
    """Return the one template, or the one called "default" of several."""
    if value is None or isinstance(value, str):
        return value
    try:
        templates = {str(entry["name"]): str(entry["template"]) for entry in value}
    except (TypeError, KeyError) as exc:
        raise AssetError(
            TOKENIZER_CONFIG,
            "chat_template is neither text nor a list of named templates",
            "correct it, or put the template into chat_template.jinja",
        ) from exc
    if "default" not in templates:
        raise AssetError(
            TOKENIZER_CONFIG,
            f"chat_template has {', '.join(sorted(templates)) or 'nothing'} but no default",
            'call one of them "default", or put it into chat_template.jinja',
        )
    return templates["default"]
