"""Owns what is learned of how long steps take: least squares over the latest ones, never below 0.

Pure: steps are handed in by the thread that runs them, and any thread may ask.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

# Fewer steps say nothing, and about so many are remembered.
MIN_STEPS = 16
_MEMORY_STEPS = 512
# What sizes are divided by, so that the three unknowns are of a kind. With the ridge it also says
# what is taken for the cause where steps were all alike: their number, as long as they are small.
_SEQUENCES, _TOKENS = 64.0, 65536.0
_RIDGE = 1e-6

_Row = tuple[float, float, float]
_NOTHING: _Row = (0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class StepSpeed:
    """Seconds of a step: for itself, for each of its sequences and for each of its tokens."""

    base_s: float
    sequence_s: float
    token_s: float


@dataclass(frozen=True)
class _Sums:
    """The normal equations of all steps so far; replaced as one, so that none is read half."""

    steps: int = 0
    rows: tuple[_Row, _Row, _Row] = (_NOTHING, _NOTHING, _NOTHING)
    right: _Row = _NOTHING

    def plus(self, features: _Row, seconds: float) -> "_Sums":
        kept = 1 - 1 / _MEMORY_STEPS
        a, b, c = (
            (
                kept * row[0] + each * features[0],
                kept * row[1] + each * features[1],
                kept * row[2] + each * features[2],
            )
            for row, each in zip(self.rows, features, strict=True)
        )
        x, y, z = (kept * s + f * seconds for s, f in zip(self.right, features, strict=True))
        return _Sums(self.steps + 1, (a, b, c), (x, y, z))


class StepFit:
    """Steps of one instance, the latest of which count most.

    Without a base, what a step takes is all put down to what is in it: then the times of things
    that wait can be added up, in however many steps they come to be done.
    """

    def __init__(self, *, has_base: bool = True) -> None:
        self._base = float(has_base)
        self._sums = _Sums()

    def observe(self, sequences: int, tokens: int, seconds: float) -> None:
        """Take note of a step with so many sequences and tokens; one thread alone may call."""
        if seconds > 0:
            features = (self._base, sequences / _SEQUENCES, tokens / _TOKENS)
            self._sums = self._sums.plus(features, seconds)

    @property
    def speed(self) -> StepSpeed | None:
        """What fits the steps best, None as long as there were too few."""
        sums = self._sums
        if sums.steps < MIN_STEPS:
            return None
        base_s, per_sequences_s, per_tokens_s = _least_squares(sums)
        return StepSpeed(
            base_s=base_s, sequence_s=per_sequences_s / _SEQUENCES, token_s=per_tokens_s / _TOKENS
        )


def _least_squares(sums: _Sums) -> Sequence[float]:
    """Returns the solution without a negative part whose error is least."""
    return min(_candidates(sums), key=lambda weights: _error(sums, weights))


def _candidates(sums: _Sums) -> Iterator[Sequence[float]]:
    """Gives the best solution for each set of unknowns that are not 0, if none is negative."""
    ridge = _RIDGE * sum(sums.rows[i][i] for i in range(3))
    for size in range(4):
        for used in combinations(range(3), size):
            matrix = [[sums.rows[i][j] + ridge * (i == j) for j in used] for i in used]
            found = _solve(matrix, [sums.right[i] for i in used])
            weights = [0.0, 0.0, 0.0]
            for place, value in zip(used, found, strict=True):
                weights[place] = value
            if min(weights) >= 0:
                yield weights


def _error(sums: _Sums, weights: Sequence[float]) -> float:
    """Returns the sum of squared errors, less what is the same for all weights."""
    return sum(
        weights[i] * (sum(sums.rows[i][j] * weights[j] for j in range(3)) - 2 * sums.right[i])
        for i in range(3)
    )


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solves a symmetric, positive definite system by elimination."""
    size = len(right)
    for i in range(size):
        for below in range(i + 1, size):
            factor = matrix[below][i] / matrix[i][i]
            for j in range(i, size):
                matrix[below][j] -= factor * matrix[i][j]
            right[below] -= factor * right[i]
    found = [0.0] * size
    for i in reversed(range(size)):
        known = sum(matrix[i][j] * found[j] for j in range(i + 1, size))
        found[i] = (right[i] - known) / matrix[i][i]
    return found
