"""Server-sent events over HTTP/1.1, and the connections that they come on.

Owns the connections: each has one request at a time, and is used again within a moment. Unlike
`bench.routers.http_calls`, which is for speed, it can tell what has gone wrong.
"""

import asyncio
import http.client
import io
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

# Servers close idle connections after some seconds, and a request must not be lost to that.
_IDLE_S = 2.0
_ERROR_BYTES = 2000
_LINE_BYTES = 1 << 22


class HttpError(Exception):
    """The server answered with another status than 200."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"HTTP {status}: {said}")
        self.status = status


@dataclass(frozen=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since: float = 0.0

    @property
    def is_usable(self) -> bool:
        is_open = not (self.reader.at_eof() or self.writer.is_closing())
        return is_open and time.monotonic() - self.idle_since < _IDLE_S


class HttpEvents:
    """A server at a base URL, such as http://127.0.0.1:8000.

    Calls raise HttpError, OSError or EOFError where the connection breaks, and ValueError for what
    is no HTTP.
    """

    def __init__(self, url: str, token: str = "") -> None:
        """Raises ValueError for a URL that is none."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"found {url!r}; must be as http://127.0.0.1:8000")
        self._host = parts.hostname
        self._is_tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._is_tls else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._head = f"Host: {parts.netloc.rpartition('@')[2]}\r\nAccept-Encoding: identity\r\n"
        self._head += f"Authorization: Bearer {token}\r\n" if token else ""
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    async def get(self, path: str) -> bytes:
        """Return the body of a resource."""
        return await self.whole(self._message("GET", path, b""))

    def post(self, path: str, body: bytes) -> bytes:
        """Return a request that `whole` and `events` take."""
        return self._message("POST", path, body)

    async def whole(self, message: bytes) -> bytes:
        """Send a request and return the body of its answer."""
        async with self._answer(message) as body:
            return b"".join([part async for part in body])

    async def events(self, message: bytes) -> AsyncGenerator[bytes]:
        """Send a request and return the data of each event of its answer."""
        rest = b""
        async with self._answer(message) as body:
            async for part in body:
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        yield line[len(b"data:") :].strip()

    async def close(self) -> None:
        """Drop all connections."""
        for connection in self._open:
            connection.writer.close()
        self._open.clear()
        self._idle.clear()

    def _message(self, method: str, path: str, body: bytes) -> bytes:
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    @asynccontextmanager
    async def _answer(self, message: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """Give the body of an answer of status 200; its connection is kept where it was read."""
        connection = await self._connection()
        keep = False
        try:
            connection.writer.write(message)
            status, headers = await _head(connection.reader)
            body = _body(connection.reader, headers)
            if status != http.client.OK:
                said = b"".join([part async for part in body])[:_ERROR_BYTES]
                raise HttpError(status, said.decode(errors="replace").strip())
            yield body
            # Whatever the reader has left out would be the next answer's beginning.
            async for _ in body:
                pass
            keep = headers.get("connection", "").lower() != "close"
        finally:
            self._give_back(connection, keep)

    async def _connection(self) -> _Connection:
        while self._idle:
            if (connection := self._idle.pop()).is_usable:
                return connection
            self._give_back(connection, False)
        reader, writer = await asyncio.open_connection(
            self._host, self._port, ssl=self._is_tls or None, limit=_LINE_BYTES
        )
        connection = _Connection(reader, writer)
        self._open.add(connection)
        return connection

    def _give_back(self, connection: _Connection, keep: bool) -> None:
        self._open.discard(connection)
        if not keep:
            connection.writer.close()
            return
        kept = _Connection(connection.reader, connection.writer, time.monotonic())
        self._open.add(kept)
        self._idle.append(kept)


async def _head(reader: asyncio.StreamReader) -> tuple[int, http.client.HTTPMessage]:
    head = await reader.readuntil(b"\r\n\r\n")
    line, _, fields = head.partition(b"\r\n")
    words = line.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise ValueError(f"the server does not speak HTTP: {line[:100]!r}")
    return int(words[1]), http.client.parse_headers(io.BytesIO(fields))


async def _body(
    reader: asyncio.StreamReader, headers: http.client.HTTPMessage
) -> AsyncIterator[bytes]:
    """Give a body piece by piece, as it comes."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int(await reader.readuntil(b"\r\n"), 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
    elif (length := headers.get("content-length")) is not None:
        yield await reader.readexactly(int(length))
    else:
        # To the end of the connection: where that breaks off is not to be told.
        while part := await reader.read(1 << 16):
            yield part
