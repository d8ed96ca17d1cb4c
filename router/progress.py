"""Owns how far one request has come over all its tries: what was given, and what goes on from it.

Knows no pool and no instance but those to be avoided; decides nothing about when a try is over.
"""

from collections.abc import Callable, Sequence

from router.answer import Answer
from router.ledger import InstanceKey
from router.request import AnswerPart, Stats, Tokens, ValidRequest
from service.errors import ServiceError
from text import Tokenizer

# The low bits of a request's id count its tries, so that each try's id is its own: a late abort of
# one never hits another. So many bits are left to chance that no two requests meet.
TRY_BITS = 12


class Progress:
    """One request over all its tries.

    A try that got tokens from decode has made progress: what it lost may be lost again as often as
    the answer grows. `max_retries` bounds the tries and resumes in a row that made none.
    """

    def __init__(
        self,
        request_id: int,
        request: ValidRequest,
        tokenizer: Tokenizer,
        stats: Stats,
        *,
        max_retries: int,
        clock: Callable[[], float],
    ) -> None:
        self.request = request
        self.stats = stats
        # What came to an end before, and is gone on from.
        self.error: ServiceError | None = None
        self.avoid: frozenset[InstanceKey] = frozenset()
        # Whether it goes ahead of what is new, once the client has tokens.
        self.goes_ahead = True
        self._original = request
        self._answer = Answer(tokenizer, request.prompt_token_ids, request.stop)
        self._given: list[int] = []
        self._request_id = request_id
        self._max_retries = max_retries
        self._clock = clock
        self._tries = 0
        self._fruitless = 0
        self._given_at = 0.0
        self._is_paused = False
        # How the pause came about: the KV went elsewhere, or is computed anew there.
        self.way = ""

    @property
    def id(self) -> int:
        """The request's id in the pools: each try has its own, and each instance in a try."""
        return self._request_id | self._tries

    @property
    def has_begun(self) -> bool:
        """Whether the client has tokens, so that another try must go on after them."""
        return bool(self._given)

    @property
    def fruitless(self) -> int:
        """Tries and resumes since decode last gave tokens."""
        return self._fruitless

    @property
    def continuation(self) -> ValidRequest:
        """What goes on after all that was given."""
        return self._original.after(self._given)

    @property
    def cached(self) -> ValidRequest:
        """What decode has the KV of, between two steps: all that was given but the last token."""
        return self._original.after(self._given[:-1])

    @property
    def last_token_id(self) -> int:
        """The token that decode goes on from; there is one."""
        return self._given[-1]

    @property
    def may_stop(self) -> bool:
        """Whether the text may end the answer, and not the tokens alone."""
        return bool(self._original.stop.strings)

    def push(self, tokens: Tokens) -> tuple[AnswerPart, float | None]:
        """Takes new tokens; returns what the client gets, and how long it waited after a move."""
        now = self._clock()
        pause_s = now - self._given_at if self._is_paused else None
        self.stats.pause_s += pause_s or 0.0
        self._is_paused = False
        self._given_at = now
        self._given.extend(tokens.token_ids)
        return self._answer.push(tokens), pause_s

    def replay(self, token_ids: Sequence[int]) -> AnswerPart:
        """Takes tokens that the client has from another router; returns what it got for them.

        To be followed by `resume`, once all are in.
        """
        self._given.extend(token_ids)
        return self._answer.push(Tokens(token_ids=tuple(token_ids)))

    def resume(self) -> None:
        """Turns to what follows the tokens that were replayed."""
        self.request = self.continuation

    def next_id(self) -> int | None:
        """Returns the id for another instance, counted as a retry; None after the last."""
        if not self._spend():
            return None
        self.stats.retries += 1
        return self.id

    def hedge_id(self) -> int | None:
        """Returns the id for a second prefill instance beside the first; no try is spent on it."""
        if self._tries + 1 >= 1 << TRY_BITS:
            return None
        self._tries += 1
        return self.id

    def begin_carry(self) -> int | None:
        """Returns the id that the sequence would have at another decode instance.

        None where there have been enough tries. Where nothing comes of it, this try goes on.
        """
        self._fruitless = -1  # as in go_on: decode has given tokens
        self.avoid = frozenset()
        return self.id if self._spend() else None

    def pause(self) -> None:
        """Takes note that decode waits for the sequence's KV to be carried over."""
        self._is_paused = True
        self.way = "kv"

    def carried(self) -> None:
        """Turns to the try that has the KV of all that was given but the last token."""
        self.stats.moves += 1
        self.request = self.continuation

    def go_on(self, *, by_decode: bool, is_failure: bool = True) -> bool | None:
        """Turns to another try after all that was given; `by_decode`: this one got tokens there.

        A try that ended by no failure is not one of those that `max_retries` bounds. Returns
        whether the answer moves, which it does where this try gave any tokens; None where there
        have been enough tries.
        """
        if by_decode:
            self._fruitless = -1  # what follows is the first of a new row
            self.avoid = frozenset()
        elif not is_failure:
            self._fruitless -= 1
        if not self._spend():
            return None
        moves = len(self._given) > self.request.output_tokens
        self.way = "prefill"
        if moves:
            self.stats.moves += 1
            self._is_paused = True
            self.request = self.continuation
        else:
            self.stats.retries += 1
        return moves

    def _spend(self) -> bool:
        if self._fruitless >= self._max_retries or self._tries + 1 >= 1 << TRY_BITS:
            return False
        self._fruitless += 1
        self._tries += 1
        return True
