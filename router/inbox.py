"""Owns what has happened and was not looked at yet: many who tell, one who reads."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

_Event = TypeVar("_Event")


class Inbox(Generic[_Event]):
    """What an asyncio.Queue without a bound does for one reader, at half the cost of a token."""

    def __init__(self) -> None:
        self._events: deque[_Event] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put_nowait(self, event: _Event) -> None:
        self._events.append(event)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    @property
    def is_awaited(self) -> bool:
        """Whether the reader waits, and has nothing to look at."""
        return not self._events and self._reader is not None and not self._reader.done()

    async def get(self) -> _Event:
        """Returns the next event; a reader that is cancelled takes none with it."""
        while not self._events:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._events.popleft()

    def take_all(self) -> list[_Event]:
        """Returns what is there, in order."""
        events = list(self._events)
        self._events.clear()
        return events
