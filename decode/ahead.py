"""Lays out the steps that are likely to come while others are computed.

Most steps are of the sequences of one before, each a token further on: but for the tokens, all that
a pass takes is known then. Owns the guesses, and the thread that works on them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from engine.runner import Inputs

S = TypeVar("S")  # what is known of a sequence


@dataclass(frozen=True, eq=False, kw_only=True)
class Coming(Generic[S]):
    """A step: its sequences, how many tokens of each are cached, and those of each dp rank."""

    sequences: Sequence[S]
    starts: Sequence[int]
    dp_tokens: Sequence[int]

    def is_like(self, other: "Coming[S]") -> bool:
        """Whether what is laid out for one is right for the other."""
        return (
            self.starts == other.starts
            and self.dp_tokens == other.dp_tokens
            # Not by name: one that has come back may be in other blocks.
            and len(self.sequences) == len(other.sequences)
            and all(a is b for a, b in zip(self.sequences, other.sequences, strict=True))
        )

    def following(self) -> "Coming[S]":
        """The step after it, if none joins and none leaves."""
        starts = [start + 1 for start in self.starts]
        return Coming(sequences=self.sequences, starts=starts, dp_tokens=self.dp_tokens)


class Ahead(Generic[S]):
    """Gives steps' inputs; for one thread.

    Args:
        lay_out: Makes the inputs of a step; from any thread. What it raises is raised when the step
            has come, if it still is then.
        depth: Steps that are under way at once: so many are followed.
    """

    def __init__(self, lay_out: Callable[[Coming[S]], Inputs], depth: int) -> None:
        self._lay_out = lay_out
        self._guesses: deque[tuple[Coming[S], Future[Inputs]]] = deque(maxlen=depth)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode-inputs")

    def inputs(self, step: Coming[S]) -> Inputs:
        """Return a step's inputs, laid out by now or not."""
        for guess in self._guesses:
            if guess[0].is_like(step):
                self._guesses.remove(guess)
                # It may have failed for want of a block that has come since.
                return guess[1].result() if guess[1].exception() is None else self._lay_out(step)
        return self._lay_out(step)

    def follow(self, step: Coming[S]) -> None:
        """Begin with the inputs of the step after this one."""
        following = step.following()
        self._guesses.append((following, self._thread.submit(self._lay_out, following)))
