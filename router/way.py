"""Owns what is noted of a try's way through the pools, for the request's figures."""

from collections.abc import Callable

from router.events import FirstToken, Grant, Transferred
from router.request import Stats


class Way:
    """One try's; what earlier tries of the request took is in `stats` already."""

    def __init__(
        self, stats: Stats, clock: Callable[[], float], *, goes_on: bool, is_local: bool
    ) -> None:
        """`goes_on`: the prompt ends with tokens that were generated before; `is_local`: it is
        computed at decode.
        """
        self._stats = stats
        self._clock = clock
        self._goes_on = goes_on
        self._is_local = is_local
        self._began_at = 0.0
        self._first_at = 0.0

    def begin(self) -> None:
        self._began_at = self._clock()
        self.prefill_at("")

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return self._clock() - self._began_at

    def prefill_at(self, name: str) -> None:
        """Note which prefill instance has the prompt now."""
        self._stats.prefill_instance = name

    def decode_at(self, name: str) -> None:
        self._stats.decode_instance = name

    def reserved(self, seconds: float) -> None:
        """Note how long it took until decode held the room."""
        self._stats.reserve_s = seconds

    def granted(self, grant: Grant) -> None:
        if not self._is_local:  # else more may be known when it is begun with
            self._stats.decode_cached_tokens = grant.cached_tokens

    def computed(self, event: FirstToken) -> None:
        """Note how the prompt came to a first token."""
        stats = self._stats
        stats.queue_s += event.queue_s
        stats.prefill_queue_s = event.queue_s
        if self._is_local:
            stats.decode_cached_tokens = event.cached_tokens
        # Of the prompt's own computation, or of the first one here where another router's was lost.
        if not (self._goes_on and stats.prefill_s):
            stats.prefill_s = event.prefill_s
            stats.cached_tokens = event.cached_tokens

    def first_token(self) -> None:
        self._first_at = self._clock()

    def second_token(self) -> None:
        self._stats.second_token_s = self._clock() - self._first_at

    def transferred(self, event: Transferred) -> None:
        self._stats.kv_bytes = event.kv_bytes
        self._stats.kv_transport = event.transport
        self._stats.handoff_s = event.handoff_s
