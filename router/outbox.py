"""Owns what is on its way from one request's life to its client: parts in order, then the end.

The life never waits for the client, and the client's writes are never cut short: gRPC takes no
status while a message is going out, and a call whose write was cancelled would hang for ever.
"""

import asyncio

from router.request import AnswerPart


class Outbox:
    """Parts of one answer, for one reader. What piled up meanwhile goes out as one message."""

    def __init__(self) -> None:
        self._parts: list[AnswerPart] = []
        self._is_closed = False
        self._reader: asyncio.Future[None] | None = None

    def put(self, part: AnswerPart) -> None:
        self._parts.append(part)
        self._wake()

    def close(self) -> None:
        """Nothing more comes."""
        self._is_closed = True
        self._wake()

    async def next(self) -> AnswerPart | None:
        """Returns all that is there as one part, as soon as there is something; None at the end."""
        while not self._parts:
            if self._is_closed:
                return None
            # A plain future: an Event, with its queue of readers, costs more for each token.
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        first, *later = self._parts
        self._parts.clear()
        return first.followed_by(*later) if later else first

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
