"""Small tokenizers of each family, built here and wrapped as a model's text files."""

import json
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from text import TextAssets

CORPUS = [
    "the quick brown fox jumps over the lazy dog, again and again.",
    "größer, schöner, weiter: naïve café déjà vu",
    "你好世界，今天天气很好。",
    "🙂🙃 emoji 👩‍👩‍👧‍👦 and flags 🇩🇪",
    "def main() -> None:\n    return 42\n",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}\n"
    "    {% if message.role not in ['system', 'user', 'assistant'] %}\n"
    "        {{ raise_exception('unknown role ' + message.role) }}\n"
    "    {% endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT_CONFIG: dict[str, Any] = {
    "eos_token": "<|im_end|>",
    "pad_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
    "chat_template": CHAT_TEMPLATE,
}


def assets(tokenizer: Tokenizer, **files: Any) -> TextAssets:
    """Wrap a tokenizer; `files` are config, generation (JSON values) and template (text)."""
    contents = {"tokenizer.json": tokenizer.to_str().encode()}
    if "config" in files:
        contents["tokenizer_config.json"] = json.dumps(files["config"]).encode()
    if "generation" in files:
        contents["generation_config.json"] = json.dumps(files["generation"]).encode()
    if "template" in files:
        contents["chat_template.jinja"] = files["template"].encode()
    return TextAssets(contents)


def byte_level() -> Tokenizer:
    """Build a byte-level BPE as Qwen's: special tokens, and added ones that are plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ),
    )
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("two words"), AddedToken("日本")])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Build a BPE as Llama 2's: ▁ for spaces, byte tokens for what it has no token for."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    named = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        CORPUS[:2],
        trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=named + bytes_),
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in named]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """Build a Unigram model as T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=150, show_progress=False, special_tokens=["<unk>", "</s>"], unk_token="<unk>"
        ),
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """Build a WordPiece model as BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(
            vocab_size=200, show_progress=False, special_tokens=["[UNK]", "[CLS]"]
        ),
    )
    return tokenizer


FAMILIES = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "word_piece": word_piece,
}


def chat_assets() -> TextAssets:
    return assets(byte_level(), config=CHAT_CONFIG, generation={"eos_token_id": [2, 0]})
