"""Measures a folder's answers: `python -m launch.builtin.evaluate FOLDER --dtype bfloat16`.

Owns the test sets and the accuracy table. Hugging Face's model runs the folder, greedily;
an answer is right only if it is exact and ended by the model itself.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.builtin import MODEL_DIR, task
from launch.builtin.task import Example
from launch.builtin.tokenizer import IM_END

RECALL_TOKENS = (256, 512, 1024, 2048, 4096)
LONGEST_TOKENS = 6144
BATCH_TOKENS = 16384
MAX_NEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """Prompts that share one line of the table."""

    name: str
    examples: list[Example]
    as_chat: bool = True


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A loaded folder."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> "Runner":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return cls(model=model, tokenizer=AutoTokenizer.from_pretrained(folder))

    def prompt_text(self, example: Example, as_chat: bool) -> str:
        if not as_chat:
            return example.prompt
        text: str = self.tokenizer.apply_chat_template(
            example.messages, tokenize=False, add_generation_prompt=True
        )
        return text

    @torch.no_grad()
    def complete(self, prompts: list[str]) -> list[str]:
        """Return the greedy completions, up to and with the special token that ends them."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        output = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        pad = self.tokenizer.pad_token_id
        return [self.tokenizer.decode([t for t in row if t != pad]) for row in new_tokens.tolist()]


def recall_sets(rng: Random, prompts: int, short_prompts: int) -> Iterator[TestSet]:
    """Yield recall at each length as a chat, and at 4,096 tokens as raw text too."""

    def examples(tokens: int, count: int) -> list[Example]:
        pairs = task.pairs_for_tokens(tokens)
        return [task.recall(rng, pairs) for _ in range(count)]

    for tokens in RECALL_TOKENS:
        count = prompts if tokens >= 2048 else short_prompts
        yield TestSet(name=f"recall, {tokens:,} tokens", examples=examples(tokens, count))
    yield TestSet(
        name=f"recall, {LONGEST_TOKENS:,} tokens",
        examples=examples(LONGEST_TOKENS, prompts // 4),
    )
    yield TestSet(
        name="recall, 4,096 tokens, raw text", examples=examples(4096, prompts // 2), as_chat=False
    )


def short_sets(rng: Random, prompts: int) -> Iterator[TestSet]:
    """Yield copies, every sum below the limit (seen and held out apart), and small talk."""
    copies = [task.copy(rng, rng.randint(6, 20)) for _ in range(prompts)]
    yield TestSet(name="copy, 6 to 20 words", examples=copies)
    yield TestSet(name="copy, raw text", examples=copies, as_chat=False)
    terms = list(product(range(task.SUM_LIMIT), repeat=2))
    seen = [task.addition(a, b) for a, b in terms if not task.is_held_out_sum(a, b)]
    held_out = [task.addition(a, b) for a, b in terms if task.is_held_out_sum(a, b)]
    yield TestSet(name="sums below 50 + 50, seen in training", examples=seen)
    yield TestSet(name="sums below 50 + 50, never seen", examples=held_out)
    yield TestSet(name="sums, never seen, raw text", examples=held_out, as_chat=False)
    yield TestSet(name="unknown text", examples=[task.unknown(rng) for _ in range(prompts)])


def count_right(runner: Runner, test_set: TestSet) -> int:
    """Return how many of the set's prompts are answered exactly and then ended."""
    prompts = [runner.prompt_text(example, test_set.as_chat) for example in test_set.examples]
    longest = max(len(ids) for ids in runner.tokenizer(prompts)["input_ids"])
    batch_rows = max(1, min(64, BATCH_TOKENS // longest))
    right = 0
    for start in range(0, len(prompts), batch_rows):
        completions = runner.complete(prompts[start : start + batch_rows])
        examples = test_set.examples[start : start + batch_rows]
        right += sum(
            text.endswith(IM_END) and example.is_right(text.removesuffix(IM_END))
            for text, example in zip(completions, examples, strict=True)
        )
    return right


def print_table(runner: Runner, sets: Iterator[TestSet], write: Callable[[str], None]) -> None:
    write("| task | prompts | right | accuracy |")
    write("|---|---:|---:|---:|")
    for test_set in sets:
        total, right = len(test_set.examples), count_right(runner, test_set)
        write(f"| {test_set.name} | {total} | {right} | {100 * right / total:.1f}% |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=MODEL_DIR)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--prompts", type=int, default=200, help="for 2,048 tokens and more")
    parser.add_argument("--short-prompts", type=int, default=500, help="for every other set")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    runner = Runner.load(args.folder, getattr(torch, args.dtype))
    rng = Random(args.seed)

    def sets() -> Iterator[TestSet]:
        yield from short_sets(rng, args.short_prompts)
        yield from recall_sets(rng, args.prompts, args.short_prompts)

    print_table(runner, sets(), lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
