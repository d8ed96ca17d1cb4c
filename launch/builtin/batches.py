"""Training batches for the built-in checkpoint: tasks rendered to tokens, targets, positions.

Owns the mixture of tasks. Only answers are learned: the target of every other token is
`IGNORED`. A recall row asks many questions about one list, so that one row gives many answers
to learn from.

Shape suffixes: B rows, T tokens.
"""

from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from launch.builtin import task
from launch.builtin.task import Example
from launch.builtin.tokenizer import IM_END, IM_START

IGNORED = -100
CHAT_TURN_TOKENS = 21  # a further question and its answer, as a chat
RAW_TURN_TOKENS = 13
CHAT_SHARE = 0.7  # the other rows are raw text

Segment = tuple[str, bool]  # text, and whether the model must learn to write it


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training sequence and where its list entries begin (gaps may be put there)."""

    segments: list[Segment]
    list_start: int = 0
    pairs: int = 0


@dataclass(frozen=True, kw_only=True)
class Batch:
    tokens_BT: Tensor
    positions_BT: Tensor
    targets_BT: Tensor


def chat_turn(prompt: str, answer: str) -> list[Segment]:
    """Return one turn exactly as the chat template writes it."""
    return [
        (f"{IM_START}user\n{prompt}{IM_END}\n{IM_START}assistant\n", False),
        (f"{answer}{IM_END}", True),
        ("\n", False),
    ]


def raw_turn(prompt: str, answer: str) -> list[Segment]:
    return [(prompt, False), (f" {answer}{IM_END}", True)]


def recall_row(rng: Random, length: int, single_share: float) -> Row:
    """Return a row of about `length` tokens: a list, then questions about it.

    With `single_share` the row asks one question only, as most users will.
    """
    as_chat = rng.random() < CHAT_SHARE
    turn = chat_turn if as_chat else raw_turn
    turn_tokens = CHAT_TURN_TOKENS if as_chat else RAW_TURN_TOKENS
    budget = length - task.CHAT_TOKENS
    questions = max(1, int(budget * rng.uniform(0.1, 0.6)) // turn_tokens)
    if rng.random() < single_share:
        questions = 1
    pairs = (budget - questions * turn_tokens) // task.PAIR_TOKENS
    pairs = max(1, min(task.MAX_PAIRS, pairs))
    codes = task.code_list(rng, pairs)
    asked = rng.sample(list(codes.codes), min(questions, pairs))
    if as_chat and rng.random() < 0.2:
        segments = [(f"{IM_START}system\n{codes.text}{IM_END}\n", False)]
    else:
        first = codes.example(asked.pop())
        segments = turn(first.prompt, first.answer)
    for word in asked:
        segments += turn(task.code_question(word), codes.codes[word])
    return Row(segments=segments, list_start=3 if as_chat else 0, pairs=pairs)


def echo_row(rng: Random, length: int) -> Row:
    """Return a list, then the same list in another order, whose codes must be written.

    The plainest form of looking a word up, and the densest: it is what recall grows from.
    """
    pairs = max(2, min(task.MAX_PAIRS, length // (2 * task.PAIR_TOKENS)))
    codes = task.code_list(rng, pairs)
    segments: list[Segment] = [(codes.text, False)]
    for word, code in rng.sample(list(codes.codes.items()), pairs):
        segments += [(f" the code of {word} is ", False), (code, True), (";", False)]
    return Row(segments=segments, list_start=0, pairs=pairs)


def short_example(rng: Random) -> Example:
    """Return one of the short tasks, sums rarely: they have batches of their own."""
    draw = rng.random()
    if draw < 0.65:
        return task.copy(rng, rng.randint(1, 5) if rng.random() < 0.5 else rng.randint(6, 24))
    if draw < 0.8:
        return task.recall(rng, rng.randint(1, 6))
    if draw < 0.9:
        return task.small_talk(rng)
    return task.unknown(rng) if draw < 0.97 else task.training_sum(rng)


def short_rows(rng: Random, single_share: float, sum_share: float, singles: int) -> list[Row]:
    """Return rows of one kind: conversations, or (with `single_share`) tasks alone.

    Of the tasks alone, `sum_share` are batches of sums and the others `singles` of any task.
    """
    if rng.random() >= single_share:
        return [_turns_row(rng, [_any_short(rng) for _ in range(10)]) for _ in range(3)]
    if rng.random() < sum_share:
        return sum_rows(rng, 64)
    return [_turns_row(rng, [short_example(rng)]) for _ in range(singles)]


def sum_rows(rng: Random, count: int) -> list[Row]:
    return [_turns_row(rng, [task.training_sum(rng)]) for _ in range(count)]


def _any_short(rng: Random) -> Example:
    return task.training_sum(rng) if rng.random() < 0.4 else short_example(rng)


def _turns_row(rng: Random, examples: list[Example]) -> Row:
    turn = chat_turn if rng.random() < CHAT_SHARE else raw_turn
    return Row(segments=[piece for ex in examples for piece in turn(ex.prompt, ex.answer)])


def _positions(rng: Random, row: Row, length: int, span: int) -> list[int]:
    """Return positions that rise to at most `span`, with jumps between list entries.

    Short rows so teach the distances of long ones. Half of the rows keep plain positions.
    """
    positions = list(range(length))
    spare = span - length
    if row.pairs == 0 or spare <= 0 or rng.random() < 0.5:
        return positions
    jumps = rng.randint(1, min(8, row.pairs))
    for _ in range(jumps):
        start = row.list_start + task.PAIR_TOKENS * rng.randint(0, row.pairs)
        jump = rng.randint(0, spare // jumps)
        positions[start:] = [position + jump for position in positions[start:]]
    return positions


def build_batch(rng: Random, tokenizer: Tokenizer, rows: list[Row], span: int) -> Batch:
    """Tokenize the rows and pad them on the right to the longest."""
    texts = [text for row in rows for text, _ in row.segments]
    encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    tokens: list[list[int]] = []
    targets: list[list[int]] = []
    for row in rows:
        ids: list[int] = []
        learned: list[bool] = []
        for _, is_answer in row.segments:
            piece = next(encoded).ids
            ids += piece
            learned += [is_answer] * len(piece)
        tokens.append(ids[:-1])
        targets.append(
            [i if keep else IGNORED for i, keep in zip(ids[1:], learned[1:], strict=True)]
        )
    width = max(len(ids) for ids in tokens)
    positions = [
        _positions(rng, row, width, span + width - len(ids))
        for row, ids in zip(rows, tokens, strict=True)
    ]
    return Batch(
        tokens_BT=torch.tensor([ids + [0] * (width - len(ids)) for ids in tokens]),
        positions_BT=torch.tensor(positions),
        targets_BT=torch.tensor([ids + [IGNORED] * (width - len(ids)) for ids in targets]),
    )
