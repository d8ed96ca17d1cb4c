"""Builds the built-in checkpoint's tokenizer: a small byte-level BPE with a chat template.

Owns the vocabulary and its ids; knows nothing of tasks or of the model. Every byte is in
the vocabulary, so any text encodes. Each digit is a token, and each known word is a token
both bare ("river") and after a space (" river"). No text is sampled: the merges follow from
the words alone, so the same words always give the same file.
"""

from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launch.builtin.words import KEYS, TEMPLATE_WORDS

ENDOFTEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIAL_TOKENS = (ENDOFTEXT, IM_START, IM_END)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

# Qwen's split: contractions, words with one leading non-letter, single digits, punctuation,
# line ends, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u0120"  # how byte-level BPE writes a space

Merge = tuple[str, str]


def _merged(symbols: list[str], merge: Merge) -> list[str]:
    """Return `symbols` with each occurrence of the pair joined, left to right."""
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == merge:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def build_merges(words: list[str]) -> list[Merge]:
    """Return BPE merges after which each word is one token, bare and after a space.

    The most frequent pair goes first and ties go to the alphabet. The space is joined last,
    so that " river" passes through "river" and costs one merge more.
    """
    pieces = {word: list(word) for word in words}
    merges: list[Merge] = []
    while True:
        counts = Counter(pair for p in pieces.values() for pair in pairwise(p))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = {word: _merged(p, best) if len(p) > 1 else p for word, p in pieces.items()}
    return merges + [(SPACE, word) for word in words]


def build_tokenizer() -> Tokenizer:
    """Return the tokenizer: specials first, then the 256 bytes, then the merged pieces."""
    words = sorted({*KEYS, *TEMPLATE_WORDS})
    merges = build_merges(words)
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys((*SPECIAL_TOKENS, *pieces)))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(folder: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Write `tokenizer.json` and `tokenizer_config.json` (with the chat template)."""
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=build_tokenizer(),
        eos_token=IM_END,
        pad_token=ENDOFTEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder, save_jinja_files=False)
    return fast
