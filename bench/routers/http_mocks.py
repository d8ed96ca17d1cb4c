"""Mock workers of the peer's kind: HTTP servers, of which decode gives tokens at a set pace.

A router of disaggregated workers sends each request to one of either role and passes on what decode
says. Owns the servers; knows no more of HTTP than such a router needs.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from bench.routers.pace import Pace
from bench.routers.stamps import Stamps

_GENERATE = "/generate"
_SAID = json.dumps({"status": "ok", "model_path": "mock", "served_model_name": "mock"}).encode()
DONE = b"[DONE]"


class Decoding:
    """The batch of one mock decode worker: who gets tokens, and how many each is still to get."""

    def __init__(self, stamps: Stamps, pace: Pace) -> None:
        self._stamps = stamps
        self._pace = pace
        self._left: dict[_Connection, int] = {}
        self._has_work = asyncio.Event()

    def join(self, connection: "_Connection", tokens: int) -> None:
        """Take a request into the batch."""
        self._left[connection] = tokens
        self._has_work.set()

    def drop(self, connection: "_Connection") -> None:
        """Forget a request."""
        if self._left.pop(connection, None) is not None and not self._left:
            self._has_work.clear()

    async def steps(self) -> None:
        """Take steps without end."""
        while True:
            await self._has_work.wait()
            await self._pace.next()
            if not self._left:
                self._pace.arrived()
                continue
            token_id = self._stamps.open(len(self._left), self._pace.arrived)
            text = f'data: {{"text":" {token_id:x}~","output_ids":[{token_id}]}}\n\n'.encode()
            self._stamps.sent(token_id)
            for connection, left in list(self._left.items()):
                connection.give(text)
                if left == 1:
                    self.drop(connection)
                    connection.end()
                else:
                    self._left[connection] = left - 1


class _Connection(asyncio.Protocol):
    """One connection of a router to a worker; `decoding` is None at prefill."""

    def __init__(self, decoding: Decoding | None) -> None:
        self._decoding = decoding
        self._rest = b""
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """Keep what to write to."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Give it nothing more."""
        if self._decoding is not None:
            self._decoding.drop(self)

    def data_received(self, data: bytes) -> None:
        """Take requests as they come."""
        self._rest += data
        while (end := self._rest.find(b"\r\n\r\n")) >= 0:
            head = self._rest[:end].decode("latin-1").lower()
            after = end + 4 + _length(head)
            if len(self._rest) < after:
                return
            body, self._rest = self._rest[end + 4 : after], self._rest[after:]
            self._take(head.split(" ", 2)[1], body)

    def give(self, event: bytes) -> None:
        """Send one event."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))

    def end(self) -> None:
        """Say that no more comes."""
        self.give(b"data: %b\n\n" % DONE)
        self._transport.write(b"0\r\n\r\n")

    def _take(self, path: str, body: bytes) -> None:
        if path != _GENERATE or self._decoding is None:
            self._transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(_SAID), _SAID)
            )
            return
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        self._decoding.join(self, json.loads(body)["sampling_params"]["max_new_tokens"])


class HttpWorkers:
    """Mock workers on given ports; a context manager that starts and ends them."""

    def __init__(
        self,
        prefills: Sequence[int],
        decodes: Sequence[int],
        *,
        stamps: Stamps,
        pace: Callable[[], Pace],
    ) -> None:
        self._prefills = prefills
        self._decodes = decodes
        self._stamps = stamps
        self._pace = pace
        self._stack = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "HttpWorkers":
        for port in self._prefills:
            await self._serve(port, None)
        for port in self._decodes:
            decoding = Decoding(self._stamps, self._pace())
            self._tasks.append(asyncio.create_task(decoding.steps()))
            await self._serve(port, decoding)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def _serve(self, port: int, decoding: Decoding | None) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Connection(decoding), "127.0.0.1", port)
        self._stack.callback(server.close)


def _length(head: str) -> int:
    """Return how long a request's body is; without the header there is none."""
    for line in head.split("\r\n"):
        if line.startswith("content-length:"):
            return int(line.partition(":")[2])
    return 0
