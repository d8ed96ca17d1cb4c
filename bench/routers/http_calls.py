"""Requests over HTTP/1.1 whose answers are server-sent events: the client of the peer.

Owns its connections, one for each request that is open. Reads chunked answers and no header but the
status.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from bench.routers.calls import Answer

_HEAD_END = b"\r\n\r\n"
_EVENT = b"data: "


class HttpCalls:
    """Requests to one path of one server; connections are kept for the next request."""

    def __init__(self, address: str, path: str, clock: Callable[[], float]) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: {address}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        ).encode()
        self._clock = clock
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()

    def call(self, request: bytes, answer: Answer) -> None:
        """Send one request; `answer` gets the data of each event, but for the closing one."""
        message = self._head + str(len(request)).encode() + _HEAD_END + request
        if self._idle:
            self._idle.pop().send(message, answer)
            return
        task = asyncio.create_task(self._open(message, answer))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def close(self) -> None:
        """Drop all connections; no answer hears of it."""
        for task in self._opening:
            task.cancel()
        for connection in list(self._all):
            connection.close()

    async def _open(self, message: bytes, answer: Answer) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self._clock, self._give_back), self._host, self._port
            )
        except OSError:
            answer.ended()
            return
        self._all.add(connection)
        connection.send(message, answer)

    def _give_back(self, connection: "_Connection", is_open: bool) -> None:
        if is_open:
            self._idle.append(connection)
        else:
            self._all.discard(connection)
            if connection in self._idle:
                self._idle.remove(connection)


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(
        self, clock: Callable[[], float], give_back: Callable[["_Connection", bool], None]
    ) -> None:
        self._clock = clock
        self._give_back = give_back
        self._answer: Answer | None = None
        self._in_head = True
        self._rest = b""
        self._events = b""
        self._transport: Any = None

    def send(self, message: bytes, answer: Answer) -> None:
        """Send a request; the connection is given back when its answer has ended."""
        self._answer = answer
        self._in_head = True
        self._transport.write(message)

    def close(self) -> None:
        """Drop the connection; the answer hears nothing more."""
        self._answer = None
        self._transport.close()

    def connection_made(self, transport: Any) -> None:
        """Keep what to write to."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """End what is open."""
        self._give_back(self, False)
        self._end()

    def data_received(self, data: bytes) -> None:
        """Take chunks as they come."""
        now = self._clock()
        self._rest += data
        if self._in_head and not self._take_head():
            return
        while (at := self._rest.find(b"\r\n")) >= 0:
            size = int(self._rest[:at], 16)
            after = at + 2 + size + 2
            if len(self._rest) < after:
                return
            chunk, self._rest = self._rest[at + 2 : after - 2], self._rest[after:]
            if size == 0:
                self._give_back(self, True)
                self._end()
                return
            self._take_events(chunk, now)

    def _take_head(self) -> bool:
        """Read the headers, if they are here; an answer that is no stream ends the connection."""
        end = self._rest.find(_HEAD_END)
        if end < 0:
            return False
        head, self._rest = self._rest[:end].lower(), self._rest[end + 4 :]
        if b" 200 " not in head[:16] or b"transfer-encoding: chunked" not in head:
            self._transport.close()
            return False
        self._in_head = False
        return True

    def _take_events(self, chunk: bytes, now: float) -> None:
        *events, self._events = (self._events + chunk).split(b"\n\n")
        for event in events:
            if self._answer is not None and event.startswith(_EVENT):
                self._answer.message(event[len(_EVENT) :], now)

    def _end(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.ended()
