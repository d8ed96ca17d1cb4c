"""Decides which prompt tokens the next step computes.

Owns the order of the waiting and the running prompts. Knows nothing of clocks, threads, devices or
block ids: the caller passes the number of free blocks, and acts on what is decided.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as the scheduler sees it.

    Attributes:
        request_id: The router's handle.
        tokens: Prompt length.
        blocks: Cache blocks the whole prompt takes.
        priority: Higher goes first.
    """

    request_id: int
    tokens: int
    blocks: int
    priority: int = 0


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
    """What to do next: prompts that have entered the cache, and the tokens to compute."""

    entering: tuple[int, ...] = ()
    slices: tuple[Slice, ...] = ()


@dataclass(kw_only=True)
class _Running:
    prompt: Prompt
    computed: int = 0


@dataclass(kw_only=True)
class Scheduler:
    """First come, first served within a priority, in chunks of a token budget.

    Attributes:
        max_batched_tokens: Tokens one step computes at most.
        max_sequences: Prompts one step works on at most.
    """

    max_batched_tokens: int
    max_sequences: int = 64
    _waiting: dict[int, Prompt] = field(default_factory=dict)
    _running: dict[int, _Running] = field(default_factory=dict)

    def add(self, prompt: Prompt) -> None:
        """Queue a prompt behind those of its priority."""
        self._waiting[prompt.request_id] = prompt

    def remove(self, request_id: int) -> None:
        """Forget a prompt, wherever it is."""
        self._waiting.pop(request_id, None)
        self._running.pop(request_id, None)

    @property
    def waiting(self) -> int:
        """Prompts that have not entered the cache."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Prompts that are partly computed."""
        return len(self._running)

    def schedule(self, free_blocks: int, enter: Callable[[int], int] = lambda _: 0) -> Step:
        """Decide one step, and take it as done.

        `enter` gives a prompt its blocks, at most as many as it asked for, and returns how many
        of its first tokens are in the cache already, at least one fewer than it has.
        """
        entering = tuple(self._enter(free_blocks, enter))
        slices = tuple(self._slices())
        for piece in slices:
            state = self._running[piece.request_id]
            state.computed += piece.length
            if state.computed == state.prompt.tokens:
                del self._running[piece.request_id]
        return Step(entering=entering, slices=slices)

    def _enter(self, free_blocks: int, enter: Callable[[int], int]) -> Iterator[int]:
        # Strictly in order: a prompt that does not fit holds back those behind it, or a stream of
        # short prompts would starve a long one.
        for prompt in sorted(self._waiting.values(), key=lambda prompt: -prompt.priority):
            if prompt.blocks > free_blocks or len(self._running) >= self.max_sequences:
                return
            free_blocks -= prompt.blocks
            del self._waiting[prompt.request_id]
            cached = enter(prompt.request_id)
            self._running[prompt.request_id] = _Running(prompt=prompt, computed=cached)
            yield prompt.request_id

    def _slices(self) -> Iterator[Slice]:
        budget = self.max_batched_tokens
        for state in sorted(self._running.values(), key=lambda state: -state.prompt.priority):
            length = min(budget, state.prompt.tokens - state.computed)
            if length == 0:
                return
            budget -= length
            yield Slice(request_id=state.prompt.request_id, start=state.computed, length=length)
