"""Owns how likely the sequences of a decode instance are to need more blocks than it has; pure.

Each sequence's final length is a random number of which mean and variance are known, cut off at its
`max_new_tokens`, and the sum of many is taken for a normal one. It is as if none of them gave its
blocks back before the last had ended, and as if they shared none: the true figure is lower. Where
the sum cannot be too large, or must be, that is said exactly.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from router.output_lengths import Moments, OutputLengths
from router.views import Capacity, InstanceKey, Need, Promise


@dataclass(frozen=True, kw_only=True)
class Held:
    """A sequence at decode. It has come to `tokens`, prompt and all."""

    key: InstanceKey
    dp_rank: int
    tenant: str
    need: Need
    tokens: int


class Blocks(NamedTuple):
    """What sequences need together at their ends."""

    least: int = 0
    most: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def plus(self, other: "Blocks") -> "Blocks":
        return Blocks(
            self.least + other.least,
            self.most + other.most,
            self.mean + other.mean,
            self.variance + other.variance,
        )


def final_blocks(held: Held, answer: Moments, capacity: Capacity) -> Blocks:
    """Returns the blocks of a sequence whose whole answer has tokens of these moments."""
    size, need = capacity.block_size, held.need
    least = capacity.blocks_for(held.tokens)
    most = max(least, capacity.blocks_for(need.total_tokens))
    prompt = need.prompt_tokens - need.generated_tokens
    if prompt + answer.mean >= need.total_tokens:
        return Blocks(most, most, most, 0.0)
    # Of the last block, any part may be filled.
    mean = (prompt + answer.mean) / size + (size - 1) / (2 * size)
    variance = answer.variance / size**2 + (1 - 1 / size**2) / 12
    return Blocks(least, most, min(max(mean, least), most), variance)


def risk(needed: Blocks, blocks: int) -> float:
    """Returns the probability that more blocks are needed than there are."""
    if needed.most <= blocks:
        return 0.0
    if needed.least > blocks or not needed.variance:
        return 1.0
    above = (blocks + 0.5 - needed.mean) / math.sqrt(2 * needed.variance)
    return 0.5 * math.erfc(above)


def risks(
    sequences: Iterable[Held], promises: Mapping[InstanceKey, Promise], lengths: OutputLengths
) -> dict[InstanceKey, float]:
    """Returns the risk of each instance: that of the dp rank where it is highest."""
    needed = {key: [Blocks()] * promise.capacity.dp for key, promise in promises.items()}
    for held in sequences:
        if held.key in promises:
            capacity, of_ranks = promises[held.key].capacity, needed[held.key]
            generated = held.tokens - held.need.prompt_tokens + held.need.generated_tokens
            answer = lengths.final_tokens(held.tenant, held.need, generated)
            more = final_blocks(held, answer, capacity)
            of_ranks[held.dp_rank] = of_ranks[held.dp_rank].plus(more)
    return {key: max(map(risk, needed[key], promise.blocks)) for key, promise in promises.items()}
