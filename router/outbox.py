"""Owns what is on its way from one request's life to its client: parts in order, then the end.

The life never waits for the client, and the client's writes are never cut short: gRPC takes no
status while a message is going out, and a call whose write was cancelled would hang for ever.
"""

import asyncio

from router.request import AnswerPart


class Outbox:
    """Parts of one answer. What piled up while the client was slow goes out as one message."""

    def __init__(self) -> None:
        self._parts: list[AnswerPart] = []
        self._is_closed = False
        self._news = asyncio.Event()

    def put(self, part: AnswerPart) -> None:
        self._parts.append(part)
        self._news.set()

    def close(self) -> None:
        """Nothing more comes."""
        self._is_closed = True
        self._news.set()

    async def next(self) -> AnswerPart | None:
        """Returns all that is there as one part, as soon as there is something; None at the end."""
        while not self._parts:
            if self._is_closed:
                return None
            self._news.clear()
            await self._news.wait()
        first, *later = self._parts
        self._parts.clear()
        return first.followed_by(*later) if later else first
