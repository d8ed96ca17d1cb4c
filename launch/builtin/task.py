"""The checkable tasks of the built-in checkpoint: recall, copy, sums and small talk.

Owns the wording of prompts and their right answers. Pure Python: knows nothing of torch or
of tokenizers, so tests and demonstrations can import it anywhere. Everything follows from
the `random.Random` that is passed in.

A list entry is always 11 tokens of the built-in tokenizer, so the length of a recall prompt
is known before it is tokenized: see `pairs_for_tokens`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from launch.builtin.words import KEYS

PAIR_TOKENS = 11  # " the code of river is 4821;"
QUESTION_TOKENS = 7  # " what is the code of river?"
CHAT_TOKENS = 8  # "<|im_start|>user\n" ... "<|im_end|>\n<|im_start|>assistant\n"
MAX_PAIRS = len(KEYS)
SUM_LIMIT = 50
UNKNOWN_ANSWER = "i only know codes, copies and sums."

_SMALL_TALK = (
    ("hello", "hello!"),
    ("hi", "hello!"),
    ("who are you?", "i am a small test model."),
    ("what can you do?", "codes, copies and sums."),
    ("thank you", "you are welcome."),
)

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt, its right answer, and the task it belongs to.

    As a chat, `prompt` is the user's message. As raw text, the model continues `prompt`
    with one space and the answer.
    """

    task: str
    prompt: str
    answer: str

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.prompt}]

    def is_right(self, completion: str) -> bool:
        """Tell whether a completion, special tokens removed, is the answer and nothing else."""
        return completion.strip() == self.answer


@dataclass(frozen=True, kw_only=True)
class CodeList:
    """A list of words and their four-digit codes, to ask questions about."""

    codes: dict[str, str]

    @property
    def text(self) -> str:
        return " ".join(f"the code of {word} is {code};" for word, code in self.codes.items())

    def example(self, word: str) -> Example:
        """Return the prompt that holds the whole list and asks for one word's code."""
        prompt = f"{self.text} {code_question(word)}"
        return Example(task="recall", prompt=prompt, answer=self.codes[word])


def code_question(word: str) -> str:
    return f"what is the code of {word}?"


def pairs_for_tokens(prompt_tokens: int) -> int:
    """Return how many list entries make a chat prompt of at most `prompt_tokens` tokens.

    Raises ValueError where that is no entry, or more than there are words.
    """
    pairs = (prompt_tokens - CHAT_TOKENS - QUESTION_TOKENS) // PAIR_TOKENS
    if not 1 <= pairs <= MAX_PAIRS:
        raise ValueError(
            f"a recall prompt of {prompt_tokens} tokens needs {pairs} words; "
            f"choose a length that needs between 1 and {MAX_PAIRS}"
        )
    return pairs


def code_list(rng: Random, pairs: int) -> CodeList:
    """Return `pairs` distinct words, each with a random code from 1000 to 9999."""
    words = rng.sample(KEYS, pairs)
    return CodeList(codes={word: str(rng.randint(1000, 9999)) for word in words})


def recall(rng: Random, pairs: int) -> Example:
    """Return a list of `pairs` codes and a question about one of them, drawn evenly."""
    codes = code_list(rng, pairs)
    return codes.example(rng.choice(list(codes.codes)))


def copy(rng: Random, words: int) -> Example:
    """Return a request to repeat `words` distinct words."""
    text = " ".join(rng.sample(KEYS, words))
    return Example(task="copy", prompt=f"repeat: {text}.", answer=text)


def addition(left: int, right: int) -> Example:
    return Example(task="sum", prompt=f"what is {left} + {right}?", answer=str(left + right))


def is_held_out_sum(left: int, right: int) -> bool:
    """Tell whether training leaves this sum out (one in thirteen), to test on."""
    return (7 * left + 11 * right) % 13 == 0


def training_sum(rng: Random) -> Example:
    """Return a sum of two numbers below `SUM_LIMIT` that training may use."""
    while True:
        left, right = rng.randrange(SUM_LIMIT), rng.randrange(SUM_LIMIT)
        if not is_held_out_sum(left, right):
            return addition(left, right)


def small_talk(rng: Random) -> Example:
    prompt, answer = rng.choice(_SMALL_TALK)
    return Example(task="talk", prompt=prompt, answer=answer)


def unknown(rng: Random) -> Example:
    """Return text that asks for nothing the model knows, and the answer that says so."""
    if rng.random() < 0.5:
        text = " ".join(rng.sample(KEYS, rng.randint(1, 12)))
    else:
        text = _random_text(rng, rng.randint(3, 40))
    return Example(task="talk", prompt=text, answer=UNKNOWN_ANSWER)


def _random_text(rng: Random, length: int) -> str:
    alphabets: Sequence[tuple[int, int]] = ((32, 126), (97, 122), (0xC0, 0x24F), (0x1F600, 0x1F64F))
    return "".join(chr(rng.randint(*rng.choice(alphabets))) for _ in range(length))
