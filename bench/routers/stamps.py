"""Which step a token is of: its id says so. Owns when each step was sent; does no I/O."""

from collections.abc import Callable

# Ids that stand for steps; below them are the bytes. Enough for a minute of many instances' steps.
FIRST_ID = 256
IDS = 1 << 14


class Stamps:
    """Moments at which steps were sent, by the token id that all sequences of a step get.

    Mocks and clients are in one process, and share this. `clock` reads seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next = 0
        self._sent_s = [0.0] * IDS
        self._missing = [0] * IDS
        self._on_all: list[Callable[[], None] | None] = [None] * IDS

    def open(self, tokens: int, on_all: Callable[[], None] | None = None) -> int:
        """Return the id of the next step's `tokens`; `on_all` is called when all have arrived."""
        index = self._next
        self._next = (index + 1) % IDS
        self._missing[index] = tokens
        self._on_all[index] = on_all
        return FIRST_ID + index

    def sent(self, token_id: int) -> None:
        """Take note that the step goes out now."""
        self._sent_s[token_id - FIRST_ID] = self._clock()

    def arrived(self, token_id: int, now: float) -> float | None:
        """Return the seconds that a token was on its way; None for one that is of no step."""
        index = token_id - FIRST_ID
        if index < 0:
            return None
        self._missing[index] -= 1
        on_all = self._on_all[index]
        if on_all is not None and self._missing[index] == 0:
            on_all()
        return now - self._sent_s[index]
