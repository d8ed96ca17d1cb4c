"""Decides which prompt tokens the next step computes.

Owns the order of the waiting and the running prompts. Knows nothing of clocks, threads, devices or
block ids: the caller passes the time and the number of free blocks, and acts on what is decided.

Each step's budget of tokens goes, in this order, to

1. the prompt that has been entitled the longest: an eighth. A prompt is entitled once it runs, and
   while it waits once it has done so for `patience_steps`. So whatever else comes, each prompt is
   computed in the end;
2. the prompts of the highest priority class, until they want no more: each time to the tenant that
   was given the least so far, and of its prompts to the most urgent. An eighth is kept for quick
   prompts, those that it is enough to finish: long ones, however urgent, do not block them;
3. the next class, and so on.

A prompt enters the cache when it gets its first tokens, and only if all of its blocks are free, so
memory is neither promised twice nor held by prompts whose turn is far off. The first prompt of a
step that does not fit is passed by others; after `max_bypasses` of these it holds back, in this and
later steps, all that would enter behind it, until it fits.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from prefill.fair_share import FairShare

# Gives a prompt its blocks; returns how many of its first tokens are in the cache already.
Enter = Callable[[int], int]

# What part of a step's budget is set aside, for the longest entitled prompt and for quick ones.
_SET_ASIDE = 8


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as the scheduler sees it; raises ValueError where it makes no sense.

    Attributes:
        request_id: The router's handle.
        tokens: Prompt length.
        blocks: Cache blocks the whole prompt takes; with a cached prefix it may need fewer.
        priority: Higher goes first.
        tenant: Who shares fairly with the others of the same priority.
        deadline_s: When its first token is due, on the clock of `now`.
    """

    request_id: int
    tokens: int
    blocks: int
    priority: int = 0
    tenant: str = ""
    deadline_s: float = math.inf

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.blocks < 0 or math.isnan(self.deadline_s):
            raise ValueError(
                f"{self.tokens} tokens, {self.blocks} blocks, due at {self.deadline_s}"
            )


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Prompt tokens [start, start + length) of one request."""

    request_id: int
    start: int
    length: int

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + self.length


@dataclass(frozen=True, kw_only=True)
class Step:
    """What to do next: prompts that enter the cache now, and the tokens to compute."""

    entering: tuple[int, ...] = ()
    slices: tuple[Slice, ...] = ()


@dataclass(kw_only=True, eq=False)
class _Entry:
    prompt: Prompt
    arrival: int
    computed: int
    # From this step on the prompt may be the one that has been entitled the longest.
    entitled_step: int
    running: bool = False
    passed: int = 0

    @property
    def left(self) -> int:
        return self.prompt.tokens - self.computed

    def urgency(self, now: float, tokens_per_s: float) -> tuple[bool, float, int]:
        """Least slack first, but what is late in any case last: it would make others late too."""
        slack = self.prompt.deadline_s - now - self.left / tokens_per_s
        return (slack < 0, abs(slack), self.arrival)


@dataclass(kw_only=True)
class _Draft:
    """A step in the making; an entry's `computed` runs ahead with it."""

    budget: int
    free_blocks: int
    enter: Enter
    entering: list[int] = field(default_factory=list)
    starts: dict[int, int] = field(default_factory=dict)
    # The first prompt that did not fit. It alone counts who passes, or a row of large prompts would
    # have been passed often enough all at once, and hold back everybody else until the last is in.
    misfit: _Entry | None = None
    closed: bool = False


@dataclass(kw_only=True)
class Scheduler:
    """Urgent prompts first, fairly among tenants, in chunks of a token budget.

    Every prompt must fit into the empty cache: one that does not would hold back all others. The
    eighths are rounded to whole blocks, so they are what they should be from a budget of eight
    blocks on.

    Attributes:
        max_batched_tokens: Tokens one step computes at most.
        max_sequences: Prompts one step works on at most.
        block_size: Tokens of a cache block; chunks end with a block or with their prompt.
        max_bypasses: Prompts that may enter past one that does not fit.
        patience_steps: Steps that a prompt waits before it is entitled to an eighth of the budget.

    Raises:
        ValueError: A number is out of range, or no block fits into a step.
    """

    max_batched_tokens: int
    max_sequences: int = 64
    block_size: int = 1
    max_bypasses: int = 16
    patience_steps: int = 64
    _entries: dict[int, _Entry] = field(default_factory=dict, init=False)
    _shares: dict[int, FairShare] = field(default_factory=dict, init=False)
    _arrivals: int = field(default=0, init=False)
    _steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if min(self.max_sequences, self.block_size) < 1:
            raise ValueError("max_sequences and block_size must be at least 1")
        if min(self.max_bypasses, self.patience_steps) < 0:
            raise ValueError("max_bypasses and patience_steps must not be negative")
        if self.max_batched_tokens < self.block_size:
            raise ValueError(
                f"max_batched_tokens is {self.max_batched_tokens}; a step must have room for a "
                f"block of {self.block_size} tokens"
            )

    def add(self, prompt: Prompt) -> None:
        """Queue a prompt; one of the same request is forgotten."""
        self.remove(prompt.request_id)
        self._arrivals += 1
        self._entries[prompt.request_id] = _Entry(
            prompt=prompt,
            arrival=self._arrivals,
            computed=0,
            entitled_step=self._steps + self.patience_steps,
        )
        self._shares.setdefault(prompt.priority, FairShare()).join(prompt.tenant)

    def remove(self, request_id: int) -> None:
        """Forget a prompt, wherever it is."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        share = self._shares[entry.prompt.priority]
        share.leave(entry.prompt.tenant)
        if not share:
            # Nobody is left whom a debt could be owed to.
            del self._shares[entry.prompt.priority]

    @property
    def waiting(self) -> int:
        """Prompts that have not entered the cache."""
        return len(self._entries) - self.running

    @property
    def running(self) -> int:
        """Prompts that are partly computed."""
        return sum(entry.running for entry in self._entries.values())

    def schedule(
        self,
        free_blocks: int,
        now: float = 0.0,
        tokens_per_s: float = math.inf,
        enter: Enter = lambda _: 0,
    ) -> Step:
        """Decide one step, and take it as done.

        `enter` is called for each prompt that enters; what it finds in the cache, whole blocks and
        at least one token fewer than the prompt has, is not computed. `now` is in seconds, on the
        clock of the deadlines; `tokens_per_s` is what a full step reaches and must be above 0. The
        work is O(n log n) for n prompts.
        """
        draft = _Draft(budget=self.max_batched_tokens, free_blocks=free_blocks, enter=enter)
        entitled = [e for e in self._entries.values() if e.entitled_step <= self._steps]
        if entitled:
            longest = min(entitled, key=lambda entry: (entry.entitled_step, entry.arrival))
            self._give(draft, longest, self._set_aside)
        for priority in sorted(self._shares, reverse=True):
            ranked = sorted(
                (entry for entry in self._entries.values() if entry.prompt.priority == priority),
                key=lambda entry: entry.urgency(now, tokens_per_s),
            )
            quick = [entry for entry in ranked if entry.left <= self._set_aside]
            kept = min(self._set_aside, sum(entry.left for entry in quick))
            # In this order, so that a quick prompt takes tokens from those before it, never blocks.
            self._share_out(draft, ranked, draft.budget - kept)
            self._share_out(draft, quick, kept)
            self._share_out(draft, ranked, draft.budget)
        return self._commit(draft)

    @property
    def _set_aside(self) -> int:
        blocks = self.max_batched_tokens // _SET_ASIDE // self.block_size
        return max(1, blocks) * self.block_size

    def _share_out(self, draft: _Draft, ranked: Sequence[_Entry], limit: int) -> None:
        """Give prompts of one class up to `limit` tokens, each time the least served tenant's."""
        queues: dict[str, deque[tuple[int, _Entry]]] = {}
        for rank, entry in enumerate(ranked):
            queues.setdefault(entry.prompt.tenant, deque()).append((rank, entry))

        def turn(tenant: str) -> tuple[int, int, str]:
            rank, entry = queues[tenant][0]
            return (self._shares[entry.prompt.priority].level(tenant), rank, tenant)

        turns = [turn(tenant) for tenant in queues]
        heapify(turns)
        while turns and limit > 0:
            *_, tenant = heappop(turns)
            _, entry = queues[tenant].popleft()
            limit -= self._give(draft, entry, limit)
            if queues[tenant]:
                heappush(turns, turn(tenant))

    def _give(self, draft: _Draft, entry: _Entry, limit: int) -> int:
        """Add up to `limit` tokens of a prompt to the step; return how many it takes."""
        limit = min(limit, draft.budget)
        if self._chunk(entry, limit) == 0 or not self._joins(draft, entry):
            return 0
        length = self._chunk(entry, limit)  # of what is left now that it may have entered
        draft.budget -= length
        draft.starts.setdefault(entry.prompt.request_id, entry.computed)
        entry.computed += length
        self._shares[entry.prompt.priority].charge(entry.prompt.tenant, length)
        return length

    def _chunk(self, entry: _Entry, limit: int) -> int:
        if entry.left <= limit:
            return entry.left
        end = (entry.computed + limit) // self.block_size * self.block_size
        return max(0, end - entry.computed)

    def _joins(self, draft: _Draft, entry: _Entry) -> bool:
        if entry.prompt.request_id in draft.starts:
            return True
        if len(draft.starts) == self.max_sequences:
            return False
        return entry.running or self._enters(draft, entry)

    def _enters(self, draft: _Draft, entry: _Entry) -> bool:
        if draft.closed:
            return False
        if entry.prompt.blocks > draft.free_blocks:
            draft.misfit = draft.misfit or entry
            draft.closed = entry.passed >= self.max_bypasses
            return False
        if draft.misfit is not None:
            draft.misfit.passed += 1
            draft.closed = draft.misfit.passed >= self.max_bypasses
        draft.free_blocks -= entry.prompt.blocks
        draft.entering.append(entry.prompt.request_id)
        entry.running = True
        entry.computed = draft.enter(entry.prompt.request_id)
        entry.entitled_step = min(entry.entitled_step, self._steps)
        return True

    def _commit(self, draft: _Draft) -> Step:
        slices = tuple(
            Slice(
                request_id=request_id,
                start=start,
                length=self._entries[request_id].computed - start,
            )
            for request_id, start in draft.starts.items()
        )
        for share in self._shares.values():
            share.settle()
        for piece in slices:
            if self._entries[piece.request_id].left == 0:
                self.remove(piece.request_id)
        self._steps += 1
        return Step(entering=tuple(draft.entering), slices=slices)
