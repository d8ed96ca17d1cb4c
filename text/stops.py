"""Finds stop strings in a growing text. Owns the text that may still become one of them.

The match that ends first wins, and of those that end together the longest: so the result
does not depend on how the text was cut into pieces.
"""

from collections.abc import Sequence

from text.errors import TextError


class StopStrings:
    """The stop strings of one request; with none of them every text passes as it is.

    Raises TextError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise TextError("a stop string is empty: it would match everywhere; leave it out")
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; return what is certain not to be part of a stop, and whether one came.

        From the stop string on all text is dropped.
        """
        if self._stopped:
            return "", True
        if not self._matchers:
            return text, False
        buffer = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            found = max(matcher.step(character) for matcher in self._matchers)
            if found:
                self._held = ""
                self._stopped = True
                return buffer[: end - found], True
        # What may still become a stop is the longest beginning of one that the text ends with.
        kept = len(buffer) - max(matcher.matched for matcher in self._matchers)
        self._held = buffer[kept:]
        return buffer[:kept], False

    def flush(self) -> str:
        """Return what was held back, at the end of the output."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """One pattern against a stream of characters (Knuth, Morris and Pratt 1977)."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._borders = _borders(pattern)
        self.matched = 0  # length of the longest beginning of the pattern that the text ends with

    def step(self, character: str) -> int:
        """Take a character; return the pattern's length where it ends here, else 0."""
        while self.matched and self._pattern[self.matched] != character:
            self.matched = self._borders[self.matched - 1]
        if self._pattern[self.matched] == character:
            self.matched += 1
        return self.matched if self.matched == len(self._pattern) else 0


def _borders(pattern: str) -> list[int]:
    """Return for each beginning of a pattern the length of its longest proper border."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders
