"""Owns what is known of instances and requests where one is placed: sizes, and what is free now.

Values alone, as the ledger shows them and a policy weighs them; nothing here changes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from typing import ClassVar, NamedTuple

from service.step_fit import StepSpeed

# What a decode instance's step counts for more when it is full than when it is empty.
_ROOM_WEIGHT = 0.1


# A request's prompt, new and expected tokens.
Size = tuple[int, int, int]


class InstanceKey(NamedTuple):
    """One life of one instance: after a restart the name is the same and the epoch is higher."""

    name: str
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What an instance said it can hold. A block is a grain of tokens on each of `cp` ranks.

    Each of `dp` ranks has as many of the blocks, and a sequence is on one of them. Decode reserves
    room for `expected_output_tokens` at first, and takes more when needed; 0: for all there may be,
    whatever a request is expected to come to.
    A token's keys and values are `token_bytes`, 0 where that is not known.
    It computes `local_prefill_tokens` of prompts in a step at most; 0: it computes none. One that
    is `colocated` computes those of all its sequences.
    """

    blocks: int
    block_size: int
    max_sequences: int
    max_sequence_tokens: int
    cp: int = 1
    dp: int = 1
    expected_output_tokens: int = 0
    token_bytes: int = 0
    local_prefill_tokens: int = 0
    colocated: bool = False

    @cached_property
    def dp_blocks(self) -> int:
        """Blocks of each dp rank."""
        return self.blocks // self.dp

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def blocks_at_first(self, need: "Need") -> int:
        """Returns what is booked for a request; what was generated before is prompt.

        That is never less than what decode reserves at first.
        """
        new = need.max_new_tokens
        if self.expected_output_tokens:
            new = min(new, max(self.expected_output_tokens, need.expected_new_tokens))
        return self.blocks_for(need.prompt_tokens + new)

    @cached_property
    def largest_sequence(self) -> int:
        """Tokens of the longest sequence that an otherwise empty instance can hold."""
        return min(self.max_sequence_tokens, self.dp_blocks * self.block_size)

    def shares(self, tokens: int, first: int) -> list[int]:
        """Returns how many of a sequence's first tokens each cp rank has.

        They are dealt grain by grain, from rank `first` on, in every second block backwards.
        """
        if self.cp == 1:
            return [tokens]
        grain = self.block_size // self.cp
        blocks, rest = divmod(tokens, self.block_size)
        shares = [blocks * grain] * self.cp
        for turn in range(self.cp):
            place = self.cp - 1 - turn if blocks % 2 else turn
            shares[(first + place) % self.cp] += max(0, min(grain, rest - turn * grain))
        return shares


@dataclass(frozen=True, kw_only=True)
class Promise:
    """The blocks that may be booked at a decode instance, by dp rank."""

    capacity: Capacity
    blocks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one request asks of the pools, in tokens, and what its answer should keep to.


    Of the prompt, the last `generated_tokens` are answer already. Of what is new, `sure_new_tokens`
    are sure to come, and it is expected to be no more than `expected_new_tokens`; 0: nothing is.
    The first token should come in `ttft_s` from now, each one after it in `tpot_s`. Where instances
    are `colocated` all of it is asked of one.
    """

    prompt_tokens: int
    max_new_tokens: int
    generated_tokens: int = 0
    sure_new_tokens: int = 0
    expected_new_tokens: int = 0
    ttft_s: float = inf
    tpot_s: float = inf
    colocated: bool = False

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.max_new_tokens

    @cached_property
    def size(self) -> Size:
        """What fits nowhere does not fit with more of any of these either."""
        return (self.prompt_tokens, self.max_new_tokens, self.expected_new_tokens)

    @property
    def decodes(self) -> bool:
        """Whether a decode instance takes part; the first token comes from prefill alone."""
        return self.max_new_tokens > 1 or self.colocated


class CachedTokens(ABC):
    """How many tokens of a request's prompt an instance is thought to have in its prefix cache."""

    @abstractmethod
    def __call__(self, key: InstanceKey, dp_rank: int = 0) -> int:
        """Return those of an instance, and of one of its dp ranks."""

    def everywhere(self) -> Mapping[InstanceKey, Sequence[int]] | None:
        """Return those of each dp rank by instance, where there are any; None: ask for each."""
        return None


class NothingCached(CachedTokens):
    """No instance has anything."""

    def __call__(self, key: InstanceKey, dp_rank: int = 0) -> int:
        return 0

    def everywhere(self) -> Mapping[InstanceKey, Sequence[int]]:
        return {}


class AskEach(CachedTokens):
    """What a function says."""

    def __init__(self, ask: Callable[[InstanceKey, int], int]) -> None:
        self._ask = ask

    def __call__(self, key: InstanceKey, dp_rank: int = 0) -> int:
        return self._ask(key, dp_rank)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a request goes. `decode` is None where prefill alone answers it.

    `prefill` is None where decode computes the prompt itself. `cached_tokens` of the prompt are
    thought to be there already where it is computed.
    `cp_first` is the cp rank that is to have its first tokens, None where load is not to say, and
    `dp_rank` decode's dp rank.
    """

    prefill: InstanceKey | None
    decode: InstanceKey | None
    cached_tokens: int = 0
    cp_first: int | None = None
    dp_rank: int = 0


class Link(NamedTuple):
    """The way from a prefill instance to a decode instance; 0 bytes per second: not measured."""

    bytes_per_s: float
    rtt_s: float


UNKNOWN_LINK = Link(0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What an instance last said of its speed; `links` are by the names of decode instances."""

    speed: StepSpeed | None = None
    links: Mapping[str, Link] = field(default_factory=dict)


UNKNOWN_PACE = Pace()


@dataclass(frozen=True, kw_only=True)
class DecodeView:
    """A dp rank of a decode instance as a policy sees it; `sequences` are all of the instance's."""

    key: InstanceKey
    capacity: Capacity
    free_blocks: int
    sequences: int
    dp_rank: int = 0
    # Of the instance's, those that this router may fill; None: all.
    slots: int | None = None
    pace: Pace = UNKNOWN_PACE

    @cached_property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that may begin here, as far as slots go; 0: none may."""
        slots = self.capacity.max_sequences if self.slots is None else self.slots
        has_slot = self.sequences < slots
        return self.capacity.largest_sequence if has_slot else 0

    @cached_property
    def free_tokens(self) -> int:
        """Room that nobody holds."""
        return self.free_blocks * self.capacity.block_size

    @cached_property
    def surely_fits(self) -> int:
        """Tokens up to which a sequence fits whatever part of it is reserved at first."""
        return min(self.longest_sequence, self.free_tokens)

    @cached_property
    def load(self) -> tuple[int, int, InstanceKey, int]:
        """Lower where there is more room, and among equals where steps are shorter."""
        return (-self.free_tokens, self.sequences, self.key, self.dp_rank)

    def fits(self, need: Need) -> bool:
        return (
            need.total_tokens <= self.longest_sequence
            and self.capacity.blocks_at_first(need) <= self.free_blocks
        )

    def room(self, cached_tokens: int) -> int:
        """Returns how many tokens are free, those of a prompt counted that need not be sent."""
        return self.free_tokens + cached_tokens

    @cached_property
    def held_tokens(self) -> int:
        """Room that is held on all dp ranks, as far as this one tells."""
        return (self.capacity.dp_blocks - self.free_blocks) * (
            self.capacity.block_size * self.capacity.dp
        )

    @cached_property
    def step_s(self) -> float:
        """Seconds of a step with all that hold room here and one more, but for its tokens.

        Infinite where the instance's speed is not known.
        """
        speed = self.pace.speed
        if speed is None:
            return inf
        sequences_s = speed.sequence_s * (self.sequences + 1)
        return speed.base_s + sequences_s + speed.token_s * self.held_tokens

    def at_pace(self, speed: StepSpeed) -> "DecodeView":
        """Returns the view of an instance that is as this one, and as fast as another."""
        return replace(self, pace=Pace(speed=speed))

    @cached_property
    def delay_s(self) -> float:
        """What one more sequence makes a step of all that are here longer, but for its tokens."""
        return self.sequences * self.pace.speed.sequence_s if self.pace.speed is not None else 0.0

    @cached_property
    def crowd_s(self) -> float:
        """What one more sequence costs a step: its own wait, and what others wait longer.

        But for its tokens: `crowd_token_s` more for each. Where steps hardly tell instances apart
        the one with more room is to be taken, which therefore costs less.
        """
        held = self.held_tokens / max(1, self.capacity.blocks * self.capacity.block_size)
        slots = self.sequences / self.capacity.max_sequences
        return self.step_s * (1 + _ROOM_WEIGHT * max(held, slots)) + self.delay_s

    @cached_property
    def token_s(self) -> float:
        """What a step takes longer for each token that is held."""
        return self.pace.speed.token_s if self.pace.speed is not None else 0.0

    @cached_property
    def crowd_token_s(self) -> float:
        """What all that are here, and one more, wait longer for a token of that one."""
        return (self.sequences + 1) * self.token_s


@dataclass(frozen=True, kw_only=True)
class PrefillView:
    """A prefill instance as a policy sees it; `owed_tokens` are those of each of its cp ranks."""

    dp_rank: ClassVar[int] = 0  # it has no others

    key: InstanceKey
    capacity: Capacity
    owed_tokens: tuple[int, ...]
    outstanding_requests: int
    max_outstanding_requests: int
    pace: Pace = UNKNOWN_PACE

    @cached_property
    def is_full(self) -> bool:
        """Whether it takes no more requests, of whatever size, before it is done with one."""
        return self.outstanding_requests >= self.max_outstanding_requests

    @cached_property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that it may be given now; 0: none may."""
        return 0 if self.is_full else self.capacity.largest_sequence

    @cached_property
    def load(self) -> tuple[int, int, InstanceKey]:
        """Lower where less has to be computed first, and among equals where fewer wait."""
        return (self.outstanding_tokens, self.outstanding_requests, self.key)

    def fits(self, need: Need) -> bool:
        return need.prompt_tokens <= self.longest_prompt

    @cached_property
    def outstanding_tokens(self) -> int:
        """Prompt tokens that it has yet to compute."""
        return sum(self.owed_tokens)

    @cached_property
    def rank_token_s(self) -> float:
        """Seconds that a cp rank takes for a token of its own, 0 where that is not known."""
        return self.pace.speed.token_s * self.capacity.cp if self.pace.speed is not None else 0.0

    @cached_property
    def step_s(self) -> float:
        """Seconds for all that wait and one more, but for their tokens; 0: that is not known."""
        speed = self.pace.speed
        if speed is None:
            return 0.0
        return speed.base_s + (self.outstanding_requests + 1) * speed.sequence_s

    @cached_property
    def ready_s(self) -> float:
        """Seconds until it is done with all that it owes and with one more, but for its tokens.

        Infinite where that takes a closer look: at ranks, or for lack of a known speed.
        """
        if self.pace.speed is None or self.capacity.cp > 1:
            return inf
        return self.step_s + self.owed_tokens[0] * self.rank_token_s

    def tokens_until(self, prompt_tokens: int, cached_tokens: int, first: int) -> int:
        """Returns how many tokens the busiest of the ranks that a prompt needs computes first.

        The prompt's own are among them.
        """
        shares = owed(self.capacity, prompt_tokens, cached_tokens, first)
        queued = zip(self.owed_tokens, shares, strict=True)
        return max((before + own for before, own in queued if own), default=0)


def owed(capacity: Capacity, prompt_tokens: int, cached_tokens: int, first: int) -> list[int]:
    """Returns what each cp rank has to compute of a prompt."""
    cached = capacity.shares(min(cached_tokens, prompt_tokens), first)
    whole = capacity.shares(prompt_tokens, first)
    return [all_of_it - known for all_of_it, known in zip(whole, cached, strict=True)]
